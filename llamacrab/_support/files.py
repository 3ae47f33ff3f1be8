"""Write files atomically, and hash their content."""

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

# More threads do not read a disk faster.
READERS_MAX = 8
# Number of hashes in the cache.
REMEMBERED_MAX = 256
# A file that was written less than this many ns ago may change again without a new time stamp.
FRESH = 2_000_000_000
# Parts of a split GGUF, as llama.cpp names them.
PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


# ------------------------------------------------------------------------------------ writing


def temporary(path: Path) -> Path:
    """Make an empty file with a unique name, to write to before it is renamed to `path`."""
    prefix = f".{path.name.lstrip('.')}."
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
    os.close(handle)
    if os.name == "posix":  # mkstemp lets only the owner read
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
    return Path(name)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: after a crash it is the old file or the new one."""
    partial = temporary(path)
    try:
        partial.write_bytes(data)
        settle(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def settle(partial: Path, whole: Path) -> None:
    """Sync a file to the disk, and rename it."""
    _sync(partial)
    partial.replace(whole)
    sync_folder(whole.parent)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with all its files, to the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
        sync_folder(path)
    else:
        _sync(path)


def sync_folder(folder: Path) -> None:
    """Sync the file names of a folder to the disk, on systems that can do that."""
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

    It detects accidental changes, not forgery.

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
    """Return the hashes of whole files, reading several at the same time."""
    return in_parallel(lambda path: content_hash(path, stop), paths)


def in_parallel(function: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """Return the result of a function that hashes, for each file."""
    n_readers = max(1, min(len(paths), READERS_MAX, os.cpu_count() or 1))
    with ThreadPoolExecutor(n_readers, "llamacrab-hash") as pool:
        return list(pool.map(function, paths))


def model_hashes(path: Path, stop: threading.Event | None = None) -> list[str]:
    """Return the hash of a model's file, or the hashes of all parts if it is split.

    Hashes are kept in the user's cache. A file is not read again if its path, size, modification
    time and inode are those of an earlier call.
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
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # no cache yet, or another format
        return {}


def _remember(found: dict[str, list[Any]]) -> None:
    """Cache hashes of files that are not being written; a read-only cache is no error."""
    now = time.time_ns()
    kept = {name: held for name, held in found.items() if abs(now - held[1]) > FRESH}
    if not kept:
        return
    every = {name: held for name, held in _remembered().items() if name not in kept} | kept
    newest = dict(list(every.items())[-REMEMBERED_MAX:])
    with contextlib.suppress(OSError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_memory(), json.dumps(newest, indent=1).encode())
