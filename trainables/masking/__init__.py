"""Which mask units the encoder does not see.

To add a strategy, write a function of a `MaskRequest` that returns `is_hidden_BU` with exactly
`request.hidden` True in each row, give it keyword-only options, and add a line to STRATEGIES of its
file (plain.py, if it looks at nothing). `hide_first(request, order_BU)` hides the units that come
first in an order; `request.noise()` fills up by chance. It works for any number of axes, and waits
for no device. How many of the hidden are padding, `hiding.hide` sees to, if the strategy does not
(`hide_first` does).

One with an option `momentum` (a schedule) is given a teacher in `request.model`: the exponential
moving average of the model, with that momentum. What one that asks the model, or that trains
something beside it, has to say, is in strategy.py.
"""

from __future__ import annotations

from trainables.masking import guided, lesions, plain
from trainables.masking.request import (
    MaskRequest,
    hidden_units,
    hide_first,
    hide_smallest,
    pixels_hidden,
    plan_hidden,
    split_indices,
    to_units,
    unit_to_patch,
)
from trainables.masking.strategy import Strategy

__all__ = [
    "MASKING",
    "MaskRequest",
    "Strategy",
    "hidden_units",
    "hide_first",
    "hide_smallest",
    "pixels_hidden",
    "plan_hidden",
    "split_indices",
    "to_units",
    "unit_to_patch",
]

MASKING: dict[str, Strategy] = plain.STRATEGIES | guided.STRATEGIES | lesions.STRATEGIES
