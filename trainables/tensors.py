"""Tensors as safetensors files that others may read as they may read any new file."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors on the host; the file's permissions are those of any new file.

    safetensors makes its files readable for their owner alone, whatever the umask: a colleague
    could then not export an encoder, nor resume a study, of a shared folder.
    """
    path.touch(mode=0o666)
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path)
    path.chmod(mode)
