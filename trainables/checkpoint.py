"""Checkpoints: tensors and counters of a running trial, so that a kill costs little and lies never.

    <folder>/<attempt>-<phase>-<step>/
        tensors.safetensors     weights and the optimiser's moments
        state.json              phase, step, and whatever else the loop counts
        manifest.json           size and SHA-256 of the other two, written last

A checkpoint is written under a name that starts with a dot, and renamed when all of it is on the
disk. What is newest is said by (phase, step) in state.json, never by a clock or a name. The newest
two complete ones are kept: one of them is there at every instant after the first save.

A training loop goes on while a `Writer` writes: it copies the tensors to the host, and waits only
where the checkpoint before is not on the disk yet.

In a store of objects a checkpoint is complete once its manifest is there, which is sent last. There
too the newest two are kept, and a checkpoint that the store lacks does not count: a trial goes on
from the same one on whichever node it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainables import durable
from trainables.errors import StorageError
from trainables.inheritance import STATE
from trainables.metrics import PHASES
from trainables.storage import Store, store
from trainables.tensors import save_tensors

KEPT = 2
MOST_KNOWN = 8  # files whose hash a process remembers: those of the kept ones, and as many again

State = dict[str, Any]

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", STATE, "manifest.json"
_log = logging.getLogger(__name__)
_Look = tuple[int, ...]


class Saved(NamedTuple):
    """A checkpoint that was written."""

    tensors: dict[str, Tensor]
    state: State
    name: str


class DamageError(StorageError):
    """A checkpoint that is not what its manifest says: which file, and what is wrong."""


class Writer:
    """Writes checkpoints of one folder, one at a time, while the trial goes on.

    As a context it waits for the last one. An error of writing is raised at the next call, or at
    the end. `saved` is told the seconds that each took, once it is on the disk.
    """

    def __init__(
        self, folder: Path, remote: str = "", saved: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self._folder, self._remote, self._saved = folder, remote, saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[float] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            # what ended the trial is told, not what befell its checkpoint besides
            with suppress(StorageError) if error else nullcontext():
                self.finish()
        finally:
            self._thread.shutdown()

    def save(self, name: str, tensors: dict[str, Tensor], state: State) -> None:
        """Take a copy, once the checkpoint before is on the disk, and begin to write it."""
        self.finish()
        copies = on_host(tensors)
        self._written = self._thread.submit(self._write, name, copies, state)

    def finish(self) -> None:
        """Wait until all is on the disk."""
        written, self._written = self._written, None
        if written is not None:
            self._saved(written.result())

    def _write(self, name: str, tensors: dict[str, Tensor], state: State) -> float:
        began = time.perf_counter()
        save(self._folder, name, tensors, state, self._remote)
        return time.perf_counter() - began


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no step changes, each in one piece; from a GPU all at once, with one wait."""
    copies = {}
    for name, value in tensors.items():
        copies[name] = torch.empty(
            value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda"
        ).copy_(value.detach(), non_blocking=True)
    if any(value.device.type == "cuda" for value in tensors.values()):
        torch.cuda.synchronize()
    return copies


def save(
    folder: Path, name: str, tensors: dict[str, Tensor], state: State, remote: str = ""
) -> Path:
    """Write a checkpoint durably, then keep the newest two. `state` holds "phase" and "step".

    `remote`: the URI in a store of objects that the folder around `folder` mirrors.
    """
    assert state["phase"] in PHASES and isinstance(state["step"], int)
    assert not name.startswith(".")
    target = _unused(folder / name)
    aside = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_tensors(tensors, aside / _TENSORS)
        _write_json(aside / _STATE, state)
        files = {file: _remembered(aside / file) for file in (_TENSORS, _STATE)}
        _write_json(aside / _MANIFEST, {"files": files})
        durable.publish_folder(aside, target)
        if remote:
            _send(store(remote), target)
        removed = _keep_newest(folder, target)
        if remote:
            _forget(store(remote), folder, removed)
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target}: the checkpoint could not be written ({error}); the one before is intact. "
            f"Make room, then run the same command again"
        ) from error
    return target


def load_latest(folder: Path, remote: str = "") -> Saved | None:
    """The newest complete checkpoint; None when nothing was ever saved.

    `remote`: bring those of the store here before, and remove what it lacks.
    A damaged one is named in a warning and the one before is taken; when all are damaged, that is
    an error, as starting from zero unasked would hide it.
    """
    if remote:
        _mirror(store(remote), folder)
    names = _names(folder)
    damaged: list[str] = []
    for name in _newest_first(folder, names, damaged):
        try:
            return load(folder, name)
        except DamageError as damage:
            damaged.append(f"{name}/{damage}")
            _log.warning("%s: %s; taking the checkpoint before", folder / name, damage)
    if damaged:
        raise StorageError(
            f"{folder}: no checkpoint is whole ({'; '.join(damaged)}). Put the files back from a "
            f"copy, or delete this folder to train the trial from its beginning"
        )
    return None


def load(folder: Path, name: str, remote: str = "") -> Saved:
    """One checkpoint by name, verified against its manifest; of a store, brought here before."""
    if remote:
        _fetch(store(remote), folder, name)
    try:
        _verify(folder / name)
        state: State = json.loads((folder / name / _STATE).read_text())
        return Saved(load_file(folder / name / _TENSORS), state, name)
    except (OSError, SafetensorError) as error:
        raise DamageError(str(error)) from error


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module | None = None
) -> dict[str, Tensor]:
    """Weights as `model/<name>` and `teacher/<name>`, moments as `optimizer/<name>/<moment>`."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if teacher is not None:
        tensors |= {f"teacher/{name}": value for name, value in teacher.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def unpack(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    teacher: nn.Module | None = None,
) -> None:
    """Put back what `pack` took; rates and decays stay as the optimiser was built."""
    model.load_state_dict(weights(tensors))
    if teacher is not None:
        teacher.load_state_dict(_under("teacher/", tensors))
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            name, moment = key.removeprefix("optimizer/").rsplit("/", 1)
            moments.setdefault(name, {})[moment] = value
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state = {number: moments[name] for number, name in enumerate(ordered) if name in moments}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def weights(tensors: dict[str, Tensor], part: str = "") -> dict[str, Tensor]:
    """The model's (or one of its parts') state_dict out of a checkpoint's tensors."""
    return _under(f"model/{part}." if part else "model/", tensors)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _names(folder: Path) -> list[str]:
    """Every checkpoint, whole or not; what an interrupted save or removal left has a dot."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _newest_first(folder: Path, names: list[str], damaged: list[str]) -> list[str]:
    """Names by (phase, step), newest first; one whose state cannot be read joins `damaged`."""
    places = {}
    for name in names:
        try:
            places[name] = (*_place(folder / name), name)
        except DamageError as damage:
            damaged.append(f"{name}/{damage}")
            _log.warning("%s: %s; taking another checkpoint", folder / name, damage)
    return sorted(places, key=places.__getitem__, reverse=True)


def _place(path: Path) -> tuple[int, int]:
    """(phase, step); only the small files are read and verified."""
    _verify(path, only=_STATE)
    state = json.loads((path / _STATE).read_text())
    return PHASES.index(state["phase"]), state["step"]


def _verify(
    path: Path,
    only: str | None = None,
    fingerprint: Callable[[Path], dict[str, Any]] | None = None,
) -> None:
    """Raise DamageError unless the files (or `only` one) have the manifest's sizes and hashes."""
    fingerprint = fingerprint or _fingerprint
    try:
        files = json.loads((path / _MANIFEST).read_bytes())["files"]
        expected = {file: files[file] for file in (_TENSORS, _STATE) if only in (None, file)}
        sizes = {file: (entry["bytes"], entry["sha256"]) for file, entry in expected.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{_MANIFEST} cannot be read ({error!r})") from error
    for file, (size, sha256) in sizes.items():
        try:
            found = fingerprint(path / file)
        except OSError as error:
            raise DamageError(f"{file} cannot be read ({error})") from error
        if found["bytes"] != size:
            raise DamageError(f"{file} has {found['bytes']} bytes, the manifest says {size}")
        if found["sha256"] != sha256:
            raise DamageError(f"{file} does not have the content that {_MANIFEST} says")


def _keep_newest(folder: Path, saved: Path) -> list[str]:
    """Remove all but `saved` and the newest other complete one, and leftovers of the past.

    Returns the names of the checkpoints that have gone.
    """
    removed = []
    kept = {saved.name}
    others = [name for name in _names(folder) if name != saved.name]
    for name in _newest_first(folder, others, damaged=[]):
        try:
            _verify(folder / name, fingerprint=_remembered)
        except DamageError:
            continue
        kept.add(name)
        if len(kept) == KEPT:
            break
    for path in list(folder.iterdir()):
        if not path.is_dir() or path.name in kept:
            continue
        if not path.name.startswith("."):
            removed.append(path.name)
            # out of sight in one step, so that no half-deleted checkpoint is ever listed
            path = durable.rename(path, folder / f".{path.name}.removed")
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _send(objects: Store, path: Path) -> None:
    for file in (_TENSORS, _STATE, _MANIFEST):
        objects.upload(f"{path.parent.name}/{path.name}/{file}", path / file)


def _forget(objects: Store, folder: Path, names: list[str]) -> None:
    """Remove checkpoints from the store, the manifests first."""
    for name in names:
        objects.remove([f"{folder.name}/{name}/{file}" for file in (_MANIFEST, _STATE, _TENSORS)])


def _mirror(objects: Store, folder: Path) -> None:
    """Make the complete checkpoints here those of the store."""
    files = [
        name
        for name in objects.entries(folder.name)
        if re.fullmatch(rf"{folder.name}/\w[\w.-]*/[\w.-]+", name)
    ]
    there = {name.split("/")[1] for name in files if name.endswith(f"/{_MANIFEST}")}
    objects.remove([name for name in files if name.split("/")[1] not in there])  # sent in part
    for name in _names(folder):
        if name not in there:
            shutil.rmtree(folder / name)
    for name in there:
        _fetch(objects, folder, name)


def _fetch(objects: Store, folder: Path, name: str) -> None:
    """Bring one checkpoint here, unless it is here as the store has it."""
    prefix = f"{folder.name}/{name}"
    there = objects.entries(prefix)
    manifest = objects.read(f"{prefix}/{_MANIFEST}")
    here = folder / name / _MANIFEST
    try:
        if manifest is not None and here.is_file() and here.read_bytes() == manifest[0]:
            return
        aside = folder / f".{name}.{os.getpid()}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        for file in (_TENSORS, _STATE, _MANIFEST):
            if (entry := there.get(f"{prefix}/{file}")) is not None:
                objects.download(f"{prefix}/{file}", aside / file, entry.size)
        if aside.is_dir():
            _replace(aside, folder / name)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{folder / name}: a checkpoint of {objects.uri} could not be brought here ({error}). "
            f"Make room, or set MASKSTUDY_CACHE on this node to another folder"
        ) from error


def _replace(aside: Path, target: Path) -> None:
    """Put a whole folder in place, unless another worker of this node has just done so."""
    try:
        if target.exists():
            durable.rename(target, target.with_name(f".{target.name}.{os.getpid()}.removed"))
        durable.rename(aside, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _unused(path: Path) -> Path:
    """`path`, or with a number behind it when an earlier checkpoint has that name."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


_known: dict[_Look, dict[str, Any]] = {}


def _remembered(path: Path) -> dict[str, Any]:
    """The same, without reading what this process has read, if it looks as it did then."""
    about = path.stat()
    look = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if look not in _known:
        while len(_known) >= MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[look] = _fingerprint(path)
    return _known[look]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False))
