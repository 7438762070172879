"""What a training step frees is kept for the next one, on a CPU.

glibc gives large blocks back to the system as soon as they are free, and the next step waits for
new pages to be mapped and cleared: a tenth to a fifth of a step of images of 120 x 160 pixels.
"""

from __future__ import annotations

import ctypes

# mallopt's parameters (man 3 mallopt) and what they are set to, in bytes
KEPT = {-1: 2**30, -2: 2**26, -3: 2**25}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Have this process keep up to 1 GiB that is free; whether its C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in KEPT.items())
