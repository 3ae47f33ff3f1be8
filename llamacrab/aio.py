"""Await a job of the scheduler from asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llamacrab.errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable

    from llamacrab._core import Job, Scheduler

# A call with more texts than this is encoded in a thread, so that the event loop goes on.
INLINE_TEXTS = 32


async def run(
    scheduler: Scheduler, job: Job, texts: list[Any], convert: Callable[[Any], Any] | None = None
) -> Any:
    """Put the texts through the scheduler and return their rows; cancelling cancels the job."""
    try:
        if len(texts) <= INLINE_TEXTS:
            try:
                job.add(texts, block=False)
            except QueueFull:
                await asyncio.to_thread(job.add, texts[job.n_added :])
        else:
            await asyncio.to_thread(job.add, texts)
        return await asyncio.wrap_future(scheduler.future(job, convert))
    except BaseException:
        # Also wakes the thread that may wait for room.
        job.cancel(wait=False)
        raise
