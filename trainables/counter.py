"""Random numbers that are a function of where they are needed: (seed, stream, step, sample).

Nothing is drawn in order, so a resumed run, another number of workers and another device get the
same bits: a worker that holds the second half of a batch names those samples and gets their part.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainables.late import Late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Late("torch")

Bits = TypeVar("Bits", "Tensor", NDArray[np.int64])  # 64 of them each

# Constants of SplitMix64 (Steele, Lea & Flood 2014), as int64 sees their bits
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def uniform(seed: int, stream: str, step: int, samples_B: Tensor, count: int) -> Tensor:
    """float32 (B, count) in [0, 1) on the device of `samples_B`, the same bits on every device.

    `samples_B` (int64): places in the global batch, or in the data set where nothing is trained.
    """
    places = torch.arange(count, dtype=torch.int64, device=samples_B.device)
    sample_key_B1 = _mix(_key(seed, stream, step) + (samples_B[:, None] + 1) * _GOLDEN)
    bits = _mix(sample_key_B1 + (places + 1) * _GOLDEN)
    # float32 holds 24 bits: more would round up to 1
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def chances(seed: int, stream: str, step: int, count: int) -> list[float]:
    """The first number of `uniform` for each of the samples 0 to `count` - 1, without torch."""
    keys = _mix(_key(seed, stream, step) + np.arange(1, count + 1, dtype=np.int64) * _GOLDEN)
    numbers: list[float] = (_shift(_mix(keys + _GOLDEN), 40) * 2.0**-24).tolist()
    return numbers


def permutation(seed: int, stream: str, epoch: int, count: int) -> Tensor:
    """int64 (count,): the order of `count` things in this epoch."""
    places = torch.arange(count, dtype=torch.int64)
    # The mixer is a bijection, so that there are no ties
    return _mix(_key(seed, stream, epoch) + (places + 1) * _GOLDEN).argsort()


def _key(seed: int, stream: str, step: int) -> int:
    words = f"{seed}/{stream}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)


def _mix(bits: Bits) -> Bits:
    bits = (bits ^ _shift(bits, 30)) * _MIX_1
    bits = (bits ^ _shift(bits, 27)) * _MIX_2
    return bits ^ _shift(bits, 31)


def _shift(bits: Bits, places: int) -> Bits:
    """Shift right and fill with zeros; int64's own shift repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
