"""Await a job of the scheduler from asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llamacrab.errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable

    from llamacrab._core import Job, Scheduler
    from llamacrab.requests.reranking import Pairs

# A call with more texts than this is encoded in a thread, so that the event loop goes on.
INLINE_TEXTS = 32
# Texts given to the scheduler at a time there.
TEXTS_A_STEP = 256


async def run(
    scheduler: Scheduler,
    job: Job,
    texts: list[Any] | Pairs,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """Put the texts through the scheduler and return their rows; cancelling cancels the job."""
    try:
        if len(texts) <= INLINE_TEXTS:
            try:
                job.add(texts[:], block=False)
            except QueueFull:
                await asyncio.to_thread(job.add, texts[job.n_added :])
        else:
            await asyncio.to_thread(_add, job, texts)
        return await asyncio.wrap_future(scheduler.future(job, convert))
    except BaseException:
        # Also wakes the thread that may wait for room.
        job.cancel(wait=False)
        raise


def _add(job: Job, texts: list[Any] | Pairs) -> None:
    for start in range(0, len(texts), TEXTS_A_STEP):
        job.add(texts[start : start + TEXTS_A_STEP])
