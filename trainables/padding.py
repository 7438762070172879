"""Padding, where a volume is smaller than the crop: no number, in any channel, once standardised.

It counts nowhere. Who may meet it is told when built (`is_padded`), so that where no volume needs
any, nobody looks for it; who forgets it computes NaN, never a number that is quietly wrong.

B batch · C channels · *S spatial axes · N places in a sequence · L cells of a grid
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainables.edges import grid_of
from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Late("torch")


def filled(values: Tensor) -> Tensor:
    """0, the mean of the data set, in place of padding."""
    return values.masked_fill(values.isnan(), 0.0)


def real_share(images: Tensor, edges: Sequence[int]) -> Tensor:
    """Share of each cell's voxels that are no padding, float32 (B, L); images (B, C, *S)."""
    grid = grid_of(images.shape[2:], edges)
    cut = [count for pair in zip(grid, edges, strict=True) for count in pair]
    is_real = ~images[:, 0].isnan().reshape(-1, *cut)
    return is_real.float().mean(dim=list(range(2, 1 + len(cut), 2))).flatten(1)


def is_padding(images: Tensor, edges: Sequence[int]) -> Tensor:
    """Which cells hold nothing but padding, bool (B, L); images (B, C, *S)."""
    return real_share(images, edges) == 0


def keys(is_padding_BN: Tensor) -> Tensor:
    """Which tokens are attended to, the class token always: bool (B, 1, 1, 1 + N), True if so."""
    return torch.nn.functional.pad(~is_padding_BN, (1, 0), value=True)[:, None, None]
