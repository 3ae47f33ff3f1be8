"""One run at a time in a folder: a lock that the system releases when its process ends."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from llamacrab._support.extras import require
from llamacrab._support.files import write_whole
from llamacrab.errors import CorpusError

NAME = ".lock"  # stays, empty: a lock whose file is removed can be held twice
HOLDER = ".lock.json"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises
    ------
    CorpusError
        Another run holds it; the message says which process, and since when.
    """
    filelock = require("filelock", extra="corpus")
    lock = filelock.FileLock(str(folder / NAME), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CorpusError(
            f"{folder} is in use by {_holder(folder)}: wait until it ends, or take another folder"
        ) from None
    try:
        with contextlib.suppress(OSError):  # it only serves the message
            about = {"pid": os.getpid(), "host": platform.node(), "since": _now()}
            write_whole(folder / HOLDER, json.dumps(about).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink()
        lock.release()


def _holder(folder: Path) -> str:
    try:
        about = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has not written that yet
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
