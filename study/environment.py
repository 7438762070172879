"""What a study ran with: versions, commit, hardware. Holds no host name and no path."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("maskstudy", "torch", "timm", "ray", "optuna", "pyarrow", "numpy")
# By whose defaults a study file is read, for good: the release that began it; none: 0.1
DEFAULTS = "0.2"
LOCK_FILES = ("uv.lock", "pylock.toml", "requirements.lock", "poetry.lock", "pixi.lock")


def environment(directory: Path | None = None) -> dict[str, Any]:
    """Versions, the git commit and lock file of `directory` (default: here), and this hardware.

    `hardware.gpus` is left empty for the caller, who knows the devices.
    """
    directory = directory or Path.cwd()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_state(directory),
        "lock_file": _lock_file(directory),
        "hardware": {
            "cpu": _cpu_model(),
            "amx": "amx_bf16" in _cpu_info(),  # then `precision: fast` computes in bf16
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [],
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a repository."""
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changes != ""}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lock_file(directory: Path) -> dict[str, str] | None:
    for name in LOCK_FILES:
        path = directory / name
        if path.is_file():
            return {"name": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return None


def _cpu_model() -> str:
    """The name printed on the chip, where Linux tells it."""
    for line in _cpu_info().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
