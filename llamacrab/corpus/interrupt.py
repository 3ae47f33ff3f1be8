"""Delay Ctrl-C until it is safe."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupt:
    """While entered, Ctrl-C raises `KeyboardInterrupt` only inside `allowed`, at its next entry,
    or on leaving.

    An exception between two steps of the bookkeeping could count a shard twice, or not at all. So a
    second Ctrl-C also waits until the bookkeeping is done. Nothing changes in other threads than
    the main one, or if the program has its own handler of the signal.
    """

    def __init__(self) -> None:
        self._open = False
        self._held = False
        self._mine = False

    def __enter__(self) -> Interrupt:
        self._mine = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._mine:
            signal.signal(signal.SIGINT, self._came)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._held and kind is None:
            raise KeyboardInterrupt

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._open = False  # raise once: bookkeeping follows
            raise KeyboardInterrupt
        self._held = True

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let Ctrl-C through."""
        self._open = True
        try:
            if self._held:
                self._held = False
                raise KeyboardInterrupt
            yield
        finally:
            self._open = False
