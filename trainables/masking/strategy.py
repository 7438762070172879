"""What a masking strategy brings along: how it hides, what it trains, and what that costs.

B batch · U mask units · P patches · V visible patches · X hidden patches · D encoder width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Whole(NamedTuple):
    """Images of which every patch was seen."""

    tokens: Tensor  # (B, 1 + P, D), normed, the class token first
    numbers_BP: Tensor  # of the patches
    is_key: Tensor | None  # which tokens are attended to; None: all


class Guide(Protocol):
    """A model as a strategy may ask it: the model itself, or its moving average."""

    part: Part | None

    def whole(self, images: Tensor) -> Whole:
        """What the encoder makes of whole images."""

    def class_attention(self, images: Tensor) -> Tensor:
        """How much the class token attends to each patch of the whole image: (B, P)."""

    def patch_errors(
        self, images: Tensor, visible_BV: Tensor, hidden_BX: Tensor, *, normalised: bool
    ) -> Tensor:
        """Mean squared error of each hidden patch (B, X)."""


class Seen(NamedTuple):
    """A training step as a part may learn from it."""

    images: Tensor
    tokens: Tensor  # (B, 1 + V, D), normed
    visible_BV: Tensor
    hidden_BX: Tensor  # those that are predicted
    is_key: Tensor | None  # which of class token, visible and hidden patches are attended to
    errors_BX: Tensor  # with a graph
    weight_BX: Tensor | None  # what each hidden patch counts; None: all the same
    unit_grid: tuple[int, ...]
    patches_per_unit: tuple[int, ...]
    is_padded: bool


class Part(NamedTuple):
    """What a strategy trains beside the autoencoder."""

    name: str  # before the names of its weights
    module: nn.Module
    loss: Callable[[nn.Module, Seen], Tensor]  # (B,)
    weight: float  # of its loss
    reads_tokens: bool  # the encoder's normed ones


class Sizes(Protocol):
    """A trial's sizes, and what its networks cost for one image, in operations."""

    patches: int
    units: int
    patches_per_unit: int

    def encoder(self, visible: int) -> int:
        """The encoder's forward pass."""

    def encoder_attention(self) -> int:
        """As far as what the class token attends to, of a whole image."""

    def decoder(self, visible: int, patches: int, outputs: int) -> int:
        """A forward pass of one like MAE's, predicting so many numbers in all."""

    def reconstruction(self, hidden_patches: int) -> int:
        """Encoder and decoder, every hidden patch predicted."""


class PartCost(NamedTuple):
    """What training a part costs for one image."""

    forward: int
    leaf: int = 0  # of it the layers whose input asks for no gradient
    compares_pairs: bool = False  # of hidden patches, which takes memory


@dataclass(frozen=True)
class Strategy:
    """An entry of MASKING. Options are the keyword-only ones of `hide`; all others are given them.

    A strategy is given a model to ask only if it says what asking costs (`guide_flops`).
    """

    hide: Callable[..., Tensor]  # (MaskRequest) -> is_hidden_BU
    guide_flops: Callable[..., int] | None = None  # (Sizes, hidden patches)
    # (makes a decoder like MAE's of so many numbers a patch) -> what is trained, if anything
    part: Callable[..., Part | None] | None = None
    part_cost: Callable[..., PartCost | None] | None = None  # (Sizes, visible, predicted patches)
    is_alike_at_every_step: bool = False  # hides the same units of an image whenever it is asked

    def __post_init__(self) -> None:
        assert (self.part is None) == (self.part_cost is None), "a part has its cost"
