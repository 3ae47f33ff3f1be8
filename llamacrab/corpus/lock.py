"""A lock that allows one run per folder. The system releases it when the process ends."""

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

NAME = ".lock"  # never removed: two processes could hold the lock of a removed file
HOLDER = ".lock.json"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises
    ------
    CorpusError
        Another run holds the lock; the message names the process and the start time.
    """
    filelock = require("filelock", extra="corpus")
    lock = filelock.FileLock(str(folder / NAME), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise CorpusError(
            f"{folder} is in use by {_holder(folder)}: wait until it ends, or use another folder"
        ) from None
    try:
        with contextlib.suppress(OSError):  # it is only for the message
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
    except (OSError, ValueError, TypeError, KeyError):  # not written yet
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
