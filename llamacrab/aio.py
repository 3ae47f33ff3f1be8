"""From a future of the scheduler to something that asyncio can await."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llamacrab.errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

# A call with more texts than this is encoded in a thread, so that the event loop goes on.
INLINE_TEXTS = 32


async def submit(submit: Callable[..., Future[Any]], *arguments: Any, **keywords: Any) -> Any:
    """Await what ``submit(*arguments, **keywords)`` promises; cancelling reaches the scheduler.

    Parameters
    ----------
    submit : callable
        Takes ``block``, and raises `QueueFull` where it is false and there is no room.
    """
    texts = arguments[-1]
    if not isinstance(texts, list) or len(texts) <= INLINE_TEXTS:
        try:
            return await asyncio.wrap_future(submit(*arguments, block=False, **keywords))
        except QueueFull:
            pass
    # The queue is full, or there is much to encode: wait for that in a thread.
    queued = asyncio.ensure_future(asyncio.to_thread(submit, *arguments, **keywords))
    try:
        future = await asyncio.shield(queued)
    except asyncio.CancelledError:
        # The thread cannot be stopped while it waits for room; what it brings is dropped.
        queued.add_done_callback(_drop)
        raise
    return await asyncio.wrap_future(future)


def _drop(queued: asyncio.Task[Future[Any]]) -> None:
    if not queued.cancelled() and queued.exception() is None:
        queued.result().cancel()
