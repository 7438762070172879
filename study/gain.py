"""Whether a study's pretraining has learnt anything: the one answer for the log, `status`, the
report, the console, `export` and Prometheus.

An encoder is judged at the end of its pretraining, whatever became of its trial afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

from study.measured import Measured
from trainables.fillings import FILLINGS, Gain, gain_of
from trainables.metrics import GAIN, parse

KEY = parse(GAIN).key
OF_GAIN = (KEY, *(f"{KEY}/{filling}" for filling in FILLINGS))  # metrics of the rows that are read
UNKNOWN = "the best trivial filling"


def gains(measured: Measured) -> dict[str, Gain]:
    """Trial -> its gain; trials that have not pretrained to the end, or not at all, are absent."""
    found = {}
    for trial, curves in measured.items():
        gain = gain_of(
            {
                metric: curves[f"pretrain/{metric}"][1.0]
                for metric in OF_GAIN
                if 1.0 in curves.get(f"pretrain/{metric}", {})
            }
        )
        if gain is not None:
            found[trial] = gain
    return found


def best_gain(found: Mapping[str, Gain]) -> tuple[str, Gain] | None:
    """The trial whose encoder fills in best, and its gain; of equals the first."""
    return max(found.items(), key=lambda pair: pair[1].decibels, default=None)


def decibels(gain: float) -> str:
    return f"{gain:+.2f} dB".replace("-", "\N{MINUS SIGN}")


def rival(gain: Gain) -> str:
    """What the gain is over, in words."""
    return UNKNOWN if gain.over is None else FILLINGS[gain.over].in_words


def in_words(gain: Gain) -> str:
    return f"{decibels(gain.decibels)} against {rival(gain)}"


def warning(best: Gain | None) -> str | None:
    """What is wrong with a study of which this is the best gain; None if nothing is."""
    if best is None or best.is_learnt:
        return None
    return (
        f"No encoder of this study fills in hidden pixels better than {rival(best)} does (best: "
        f"{decibels(best.decibels)}): pretraining has not learnt the images yet. What its encoders "
        f"are worth all the same, only random weights beside them tell. Pretrain for longer, raise "
        f"pretrain.optimizer.base_lr, or take a larger model; `maskstudy check STUDY.yaml "
        f"--forecast 60` estimates the steps it takes."
    )
