"""Files that are there whole or not at all, and hashes that name what is in them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llamacrab._support.extras import require
from llamacrab._support.fetch import cache_dir, sha256_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

T = TypeVar("T")

__all__ = [
    "content_hash",
    "content_hashes",
    "in_parallel",
    "model_hashes",
    "settle",
    "sha256_of",
    "sync_folder",
    "sync_tree",
    "temporary",
    "write_whole",
]

# More threads than this do not read a disk faster.
READERS_MAX = 8
# Hashes that are remembered.
REMEMBERED_MAX = 256
# A file that was written so short a time ago, in ns, may change again with the same time.
FRESH = 2_000_000_000
# Parts of a GGUF that was split, as llama.cpp names them.
PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


# ------------------------------------------------------------------------------------ writing


def temporary(path: Path) -> Path:
    """Make an empty file to write to before it gets the name `path`; no other has its name."""
    prefix = f".{path.name.lstrip('.')}."
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
    os.close(handle)
    if os.name == "posix":  # mkstemp lets only the owner read
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
    return Path(name)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one, and on the disk."""
    partial = temporary(path)
    try:
        partial.write_bytes(data)
        settle(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def settle(partial: Path, whole: Path) -> None:
    """Have a file reach the disk, and give it its name."""
    _sync(partial)
    partial.replace(whole)
    sync_folder(whole.parent)


def sync_tree(path: Path) -> None:
    """Have a file, or a folder with all that is in it, reach the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
        sync_folder(path)
    else:
        _sync(path)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where the system can be told to."""
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int = os.O_RDWR) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------ hashing


def content_hash(path: Path, stop: threading.Event | None = None) -> str:
    """Return the XXH3 hash of a whole file, in 128 bits (extra ``corpus``).

    It tells files apart that were changed by accident. It is not made against forgery.

    Raises
    ------
    CancelledError
        `stop` was set.
    """
    digest = require("xxhash", extra="corpus").xxh3_128()
    with path.open("rb", buffering=0) as file:
        space = bytearray(1 << 20)
        view = memoryview(space)
        while n := file.readinto(space):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(view[:n])
    return str(digest.hexdigest())


def content_hashes(paths: Sequence[Path], stop: threading.Event | None = None) -> list[str]:
    """Return the hashes of whole files, several of which are read at the same time."""
    return in_parallel(lambda path: content_hash(path, stop), paths)


def in_parallel(function: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """Return what a function that hashes says of each file."""
    n_readers = max(1, min(len(paths), READERS_MAX, os.cpu_count() or 1))
    with ThreadPoolExecutor(n_readers, "llamacrab-hash") as pool:
        return list(pool.map(function, paths))


def model_hashes(path: Path, stop: threading.Event | None = None) -> list[str]:
    """Return the hashes of a model's file, or of its files where it is split.

    A file whose path, size, time of change and inode are those of an earlier call is not read
    again: its hash is remembered in the user's cache.
    """
    files = _parts(path.resolve())
    stamps = {str(file): _stamp(file) for file in files}
    known = {
        name: held[-1] for name, held in _remembered().items() if held[:-1] == stamps.get(name)
    }
    new = [file for file in files if str(file) not in known]
    found = dict(zip(map(str, new), content_hashes(new, stop), strict=True))
    _remember({name: [*stamps[name], value] for name, value in found.items()})
    return [(known | found)[str(file)] for file in files]


def _parts(path: Path) -> list[Path]:
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match.groups()
    numbered = (path.with_name(f"{stem}-{k:05}-of-{count}.gguf") for k in range(1, int(count) + 1))
    return [file for file in numbered if file.is_file()]


def _stamp(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ino]


def _memory() -> Path:
    return cache_dir() / "hashes.json"


def _remembered() -> dict[str, list[Any]]:
    try:
        held = json.loads(_memory().read_text(encoding="utf-8"))
        return {name: [*stamp, value] for name, (*stamp, value) in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or of another kind
        return {}


def _remember(found: dict[str, list[Any]]) -> None:
    """Keep hashes of files that are not being written; a cache that is read-only is no error."""
    now = time.time_ns()
    kept = {name: held for name, held in found.items() if abs(now - held[1]) > FRESH}
    if not kept:
        return
    every = {name: held for name, held in _remembered().items() if name not in kept} | kept
    newest = dict(list(every.items())[-REMEMBERED_MAX:])
    with contextlib.suppress(OSError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_memory(), json.dumps(newest, indent=1).encode())
