"""Object stores: what lies under a URI such as s3://bucket/prefix, and its mirror on this node.

Where a study is kept in a store, the store is the truth: what counts as written is there. Folders
are mirrors of it, each node's own, and may be deleted at any time.

Credentials and endpoints come from the environment alone (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...;
GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME, ...). What fails for a moment is tried
again, for MASKSTUDY_STORE_SECONDS (60) at most.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from trainables import durable
from trainables.errors import StorageError, UserError

KINDS = {"s3": "Amazon S3 and what speaks like it", "gs": "Google Cloud Storage", "az": "Azure"}
PIECE_BYTES = 16 * 2**20  # of a request: what takes longer than its time limit must be small
REQUEST_SECONDS = 60.0
THREADS = 16

_URI = re.compile(r"([a-z0-9]+)://([A-Za-z0-9][A-Za-z0-9_.-]*)((?:/[A-Za-z0-9_=+.-]+)*)/?")


class Tag(NamedTuple):
    """Which content of an object is meant, in the store's words."""

    etag: str | None
    version: str | None


class Entry(NamedTuple):
    """An object in a listing."""

    size: int
    tag: Tag


def is_uri(text: str) -> bool:
    return "://" in text


def check_uri(uri: str) -> None:
    """ValueError: what is wrong with the text of a URI."""
    expected = "expected a folder, or a URI such as s3://bucket/prefix"
    if "@" in uri or "?" in uri:
        # it may hold a secret, so it is not repeated
        raise ValueError(
            f"given a {uri.partition('://')[0]}:// address with more than a path in it; "
            f"{expected}; credentials belong into the environment, such as AWS_ACCESS_KEY_ID"
        )
    found = _URI.fullmatch(uri)
    if found is None or found[1] not in KINDS or ".." in uri.split("/"):
        known = ", ".join(f"{kind}:// ({name})" for kind, name in KINDS.items())
        raise ValueError(f"given {uri!r}; {expected}; stores known: {known}")


def join(uri: str, *parts: str) -> str:
    """Parts may have several names, or be empty or `.`."""
    names = [name for part in parts for name in part.split("/") if name not in ("", ".")]
    return "/".join([uri.rstrip("/"), *names])


def default_cache() -> Path:
    """Where this node keeps prepared data and mirrors: $MASKSTUDY_CACHE, or ~/.cache/maskstudy."""
    return Path(os.environ.get("MASKSTUDY_CACHE") or "~/.cache/maskstudy").expanduser()


def mirror_of(uri: str) -> Path:
    """The folder of this node that mirrors what lies under a URI."""
    kind, _, place = uri.rstrip("/").partition("://")
    return default_cache() / "mirrors" / kind / place


@lru_cache(maxsize=256)
def store(uri: str) -> Store:
    """What lies under `uri`. UserError: no such kind of store, or its package is missing."""
    return Store(uri)


class Store:
    """The objects under one URI; names count from there. Every failure is a StorageError."""

    def __init__(self, uri: str) -> None:
        try:
            check_uri(uri)
        except ValueError as error:
            raise UserError(f"storage: {error}") from None
        try:
            import obstore
        except ImportError as error:
            raise UserError(
                f"{uri}: stores of objects need a package that is not installed here; "
                f"pip install 'maskstudy[cloud]', on every node, or take a folder as storage"
            ) from error
        self.uri = uri.rstrip("/")
        self._obstore: Any = obstore
        is_plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        seconds = float(os.environ.get("MASKSTUDY_STORE_SECONDS") or 60)
        try:
            self._store = obstore.store.from_url(
                self.uri,
                client_options={
                    "timeout": timedelta(seconds=REQUEST_SECONDS),
                    "connect_timeout": timedelta(seconds=5),
                    **({"allow_http": True} if is_plain else {}),
                },
                retry_config={
                    "max_retries": 1000,
                    "retry_timeout": timedelta(seconds=seconds),
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.1),
                        "max_backoff": timedelta(seconds=3),
                        "base": 2,
                    },
                },
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise UserError(f"{self.uri}: {_first_line(error)}") from error

    def create(self, name: str, content: bytes) -> Tag | None:
        """Write an object that must not be there yet; None: it is, with another content."""
        try:
            return self.claim(name, content)
        except FileExistsError:
            # the answer to our own request may have been lost on its way
            found = self.read(name)
            return found[1] if found is not None and found[0] == content else None

    def claim(self, name: str, content: bytes) -> Tag:
        """Write an object that must not be there yet, whoever wrote it: else FileExistsError."""
        exceptions = self._obstore.exceptions
        with self._telling(name, writes=True):
            try:
                return _tag(self._store.put(name, content, mode="create"))
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                pass
        raise FileExistsError(join(self.uri, name))

    def replace(self, name: str, content: bytes, before: Tag | None) -> Tag | None:
        """Write an object that holds what `before` says; None: somebody has changed it since."""
        if before is None:
            return self.create(name, content)
        exceptions = self._obstore.exceptions
        # the second one for Ceph, to which a tag within its quotes is another one
        for etag in (before.etag, before.etag and before.etag.strip('"')):
            named = {"e_tag": etag, "version": before.version}
            mode = {key: value for key, value in named.items() if value is not None}
            with self._telling(name, writes=True):
                try:
                    return _tag(self._store.put(name, content, mode=mode))
                except exceptions.PreconditionError:
                    found = self.read(name)
                except (exceptions.NotSupportedError, NotImplementedError):
                    break
            if found is None or found[1] != before:
                return found[1] if found is not None and found[0] == content else None
        return self.put(name, content)

    def put(self, name: str, content: bytes) -> Tag:
        with self._telling(name, writes=True):
            return _tag(self._store.put(name, content, mode="overwrite"))

    def read(self, name: str) -> tuple[bytes, Tag] | None:
        """An object's content and tag; None if there is none."""
        with self._telling(name):
            try:
                found = self._store.get(name)
                return bytes(found.bytes()), _tag(found.meta)
            except FileNotFoundError:
                return None

    def exists(self, name: str) -> bool:
        with self._telling(name):
            try:
                self._store.head(name)
            except FileNotFoundError:
                return False
            return True

    def remove(self, names: Sequence[str]) -> None:
        """Objects that are not there count as removed."""
        for name in names:
            with self._telling(name, writes=True):
                try:
                    self._store.delete(name)
                except FileNotFoundError:
                    continue

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """Every object below `prefix`, which is whole names of folders."""
        with self._telling(prefix):
            pages = self._store.list(prefix=prefix or None)
            return {
                found["path"]: Entry(int(found["size"]), _tag(found))
                for page in pages
                for found in page
            }

    def folders(self) -> list[str]:
        """Names of what would be folders right below the URI."""
        with self._telling(""):
            found = self._store.list_with_delimiter()["common_prefixes"]
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def upload(self, name: str, path: Path) -> None:
        """A file, in pieces if it is large; it is there whole or not at all."""
        with self._telling(name, writes=True):
            self._store.put(name, path, mode="overwrite")

    def download(self, name: str, path: Path, size: int) -> Tag:
        """An object of that size as a file, whole or not at all; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path) as aside, aside.open("wb") as file, self._telling(name):
            if size <= PIECE_BYTES:
                found = self._store.get(name)
                tag = _tag(found.meta)
                file.write(found.bytes())
            else:
                tag = _tag(self._store.head(name))
                for start in range(0, size, PIECE_BYTES):
                    length = min(PIECE_BYTES, size - start)
                    file.write(self._store.get_range(name, start=start, length=length))
        return tag

    def probe(self) -> None:
        """Fail as a study would, if the store cannot be reached or refuses us."""
        with self._telling(""):
            self._store.list_with_delimiter()

    @contextmanager
    def _telling(self, name: str, *, writes: bool = False) -> Iterator[None]:
        """Errors of the store become ours: what, why, and the way out."""
        where = join(self.uri, name)
        again = "run the same command again, it continues from what the store has acknowledged"
        try:
            yield
        except (
            self._obstore.exceptions.BaseError,
            FileNotFoundError,
            NotImplementedError,
        ) as error:
            said = _first_line(error)
            # of a listing, the library tells no kind of error, only the answer
            if re.search("NoSuchBucket|ContainerNotFound", str(error)):
                text = f"no such bucket ({said}). Make it, or name another one"
            elif re.search("403 Forbidden|401 Unauthorized", str(error)):
                text = (
                    f"the store refuses to {'write' if writes else 'read'} it ({said}). "
                    f"Give this machine's credentials that right, then {again}"
                )
            elif isinstance(error, FileNotFoundError):
                text = f"it is gone ({said}). Put it back, then {again}"
            else:
                text = (
                    f"the store cannot be {'written to' if writes else 'read'} ({said}). "
                    f"See that it can be reached and has room, then {again}"
                )
            raise StorageError(f"{where}: {text}") from error


def each_at_once(jobs: Iterable[Any], call: Any) -> list[Any]:
    """The results of `call` for every job; many are under way at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, jobs))


def _tag(found: Any) -> Tag:
    return Tag(found["e_tag"], found["version"])


def _first_line(error: Exception) -> str:
    """What happened, without the library's account of itself."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.removeprefix("Generic ")[:400]
