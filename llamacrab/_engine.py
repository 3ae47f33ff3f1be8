"""`Engine`: the models and the scheduler of one `Llama`, and the four ways to run a request.

A request is one call: its inputs, and what becomes of their rows. `run` waits for the result,
`submit` returns a future, `arun` is awaited, `stream` takes requests one after another. What they
have in common is written once: texts are queued in steps, a long run of them calibrates the size
of packs, and an error speaks of the caller's texts and holds what had been computed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from llamacrab import tuning
from llamacrab._core import Model, Scheduler, devices, kernels
from llamacrab._support.extras import require
from llamacrab.errors import AllocationError, ClosedError, LlamaError, QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from llamacrab._core import Job, PoolingType
    from llamacrab.tuning import Layout

# A text longer than this many tokens needs an explicit n_ctx: the buffers for it are large.
N_CTX_DEFAULT_MAX = 8192
N_SEQ_MAX = 256
# Texts that are queued between two looks at progress.
TEXTS_PER_STEP = 256
# After this many texts without a pause, packs may vary in size to find the best one.
CALIBRATION_TEXTS = 1024
# `arun` splits more texts than this into tokens in a thread, so that the event loop goes on.
INLINE_TEXTS = 32
# Requests of a stream in the queue: one that is awaited, and two that keep the workers busy.
STREAM_AHEAD = 3


class Inputs(Protocol):
    """Texts or token ids that can be sliced; slices are lists."""

    def __len__(self) -> int: ...
    def __getitem__(self, wanted: slice, /) -> list[Any]: ...


class Request(Protocol):
    """One call."""

    def job(self, scheduler: Scheduler) -> Job:
        """Prepare the inputs, and return a job for them."""

    @property
    def inputs(self) -> Inputs:
        """What to queue, once there is a job."""

    def finish(self, rows: Any) -> Any:
        """Turn the job's rows into the call's result."""

    def remap_error(self, error: LlamaError) -> None:
        """Make an error of the job speak of the caller's texts, and hold their results."""


class Engine:
    """The models of one `Llama`, a copy per device, behind one scheduler.

    Parameters
    ----------
    path : path
        The GGUF file.
    devices : sequence of str, optional
        Devices that each hold a copy of the model.
    n_gpu_layers : int
        As for `Model`.
    model_params : dict
        The other keywords of each `Model`.
    n_ctx, n_ubatch, n_seq_max : int
        Sizes; 0 where the caller did not say. See `Llama`.
    given : llamacrab.tuning.Layout
        The layout as far as the caller gave it.
    n_cpus : int
        CPUs that all contexts together may use; 0: all that the process may use.
    choose_pooling : callable
        Called with the first model; returns the pooling of all contexts.
    scheduler_params : dict
        The other keywords of the `Scheduler`, ``deterministic`` among them.

    Attributes
    ----------
    models : list of Model
        One per device.
    layouts : list of llamacrab.tuning.Layout
        How each of them computes.
    layout_sources : list of dict
        Where each number of those comes from.
    scheduler : Scheduler
        The queue, and the workers of all models.
    n_ctx : int
        Tokens of the longest text that fits.
    backends : list of str
        What computes, see `Llama.backends`.
    larger : str
        How to make room for longer texts; empty where there is no way.
    """

    def __init__(
        self,
        path: Path,
        *,
        devices: Sequence[str] | None,
        n_gpu_layers: int,
        model_params: dict[str, Any],
        n_ctx: int,
        n_ubatch: int,
        n_seq_max: int,
        given: Layout,
        n_cpus: int = 0,
        choose_pooling: Callable[[Model], PoolingType],
        scheduler_params: dict[str, Any],
    ) -> None:
        places = devices or (None,)
        self.models = [
            Model(path, n_gpu_layers=n_gpu_layers, device=device, **model_params)
            for device in places
        ]
        on_gpu = [
            n_gpu_layers != 0 and tuning.has_gpu(None if device is None else [device])
            for device in places
        ]
        self._on_gpu = on_gpu[0]
        self.backends = _backends(self.models, on_gpu)
        known = [tuning.recall(model, gpu) for model, gpu in zip(self.models, on_gpu, strict=True)]
        self.layouts = [
            tuning.choose(
                None if entry is None else entry.layout,
                on_gpu=gpu,
                given=given,
                n_replicas=on_gpu.count(gpu),
                cpu_backend=model.cpu_backend,
                n_cpus=n_cpus,
            )
            for model, gpu, entry in zip(self.models, on_gpu, known, strict=True)
        ]
        self.layout_sources = [
            tuning.sources(
                None if entry is None else entry.layout,
                given=given,
                measured=str(entry or ""),
                n_replicas=on_gpu.count(gpu),
                n_cpus=n_cpus,
            )
            for gpu, entry in zip(on_gpu, known, strict=True)
        ]
        n_ctx = n_ctx or min(self.models[0].n_ctx_train, N_CTX_DEFAULT_MAX)
        scheduler_params = {"pooling_type": choose_pooling(self.models[0]), **scheduler_params}
        self.scheduler = self._start(
            n_ctx, n_ubatch, n_seq_max, scheduler_params, may_shrink=not given.pack_tokens
        )
        self.n_ctx_wanted = n_ctx
        self.n_ctx = min(n_ctx, self.scheduler.context.n_tokens_max)
        n_ctx_train = self.models[0].n_ctx_train
        self.larger = ""
        if self.n_ctx < n_ctx and n_ubatch:
            self.larger = f"make the Llama with n_ubatch={n_ctx}"
        elif n_ctx < n_ctx_train:
            self.larger = f"make the Llama with a larger n_ctx, up to {n_ctx_train}"
        # Explicit sizes are kept; so is what has been measured before.
        fixed = given.pack_tokens or self.scheduler.deterministic or devices
        may_tune = len(known) == 1 and (known[0] is None or known[0].is_due()) and not fixed
        self._calibration = tuning.Calibration(self.scheduler) if may_tune else None
        self._lock = threading.Lock()
        self._n_running = 0  # [lock] requests that have begun and not ended
        self._n_texts = 0  # [lock] texts queued since there was none

    def _start(
        self,
        n_ctx: int,
        n_ubatch: int,
        n_seq_max: int,
        params: dict[str, Any],
        *,
        may_shrink: bool,
    ) -> Scheduler:
        """Return a scheduler for texts of up to `n_ctx` tokens, and packs as `layouts` has them."""

        def sizes(layout: Layout) -> dict[str, Any]:
            ubatch = n_ubatch or max(n_ctx, layout.pack_tokens)
            seqs = n_seq_max or max(1, min(N_SEQ_MAX, layout.pack_tokens // 4))
            return {
                "n_contexts": layout.n_contexts,
                "pack_tokens": layout.pack_tokens,
                # The cells of a causal model hold a pack, and what its texts share, which is no
                # more than a text; a model with a table of positions takes no more than it has.
                "n_ctx": n_ctx + (0 if self.models[0].has_position_table else layout.pack_tokens),
                "n_batch": max(n_ctx, ubatch, seqs),
                "n_ubatch": ubatch,
                "n_seq_max": seqs,
                "n_threads": layout.n_threads,
                "flash_attn": layout.flash_attn,
            }

        while True:
            first, *others = map(sizes, self.layouts)
            replicas = list(zip(self.models[1:], others, strict=True))
            try:
                return Scheduler(self.models[0], replicas=replicas, **first, **params)
            except AllocationError:
                # A GPU may have no room for a pack that others have room for.
                largest = max(layout.pack_tokens for layout in self.layouts)
                if not may_shrink or largest <= tuning.PACK_TOKENS_CPU:
                    raise
            self.layouts = [
                replace(layout, pack_tokens=min(layout.pack_tokens, largest // 2))
                for layout in self.layouts
            ]

    def close(self) -> None:
        """Stop all work at once, and free the models."""
        self.scheduler.close()
        for model in self.models:
            model.close()

    # ------------------------------------------------------------------------------ four ways

    def run(self, request: Request, *, timeout: float | None = None, progress: bool = False) -> Any:
        """Return the result of a request.

        Parameters
        ----------
        request : Request
            The call.
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.
        progress : bool
            Show a progress bar.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        job = None
        self._begin()
        try:
            job = request.job(self.scheduler)
            with _progress_bar(len(request.inputs) if progress else None) as show:
                self._add(job, request.inputs, deadline=deadline, show=show)
                job.seal()
                rows = job.wait(deadline=deadline, progress=show)
            return request.finish(rows)
        except BaseException as error:
            _stop(job, request, error)
            raise
        finally:
            self._end()

    def submit(self, request: Request, *, block: bool = True) -> Future[Any]:
        """Queue a request and return a future of its result.

        Parameters
        ----------
        request : Request
            The call.
        block : bool
            Wait while the queue is full; else raise `QueueFull`.
        """
        job = None
        self._begin()
        try:
            job = request.job(self.scheduler)
            self._add(job, request.inputs, block=block)
            future = self.scheduler.future(job, request.finish, request.remap_error)
        except BaseException as error:
            _stop(job, request, error)
            self._end()
            raise
        future.add_done_callback(lambda _: self._end())
        return future

    async def arun(self, request: Request) -> Any:
        """Await the result of a request. Cancelling the task cancels the request."""
        job = None
        in_thread = len(request.inputs) > INLINE_TEXTS
        self._begin()
        try:
            if in_thread:
                job = await asyncio.to_thread(request.job, self.scheduler)
                await asyncio.to_thread(self._add, job, request.inputs)
            else:
                job = request.job(self.scheduler)
                try:
                    self._add(job, request.inputs, block=False)
                except QueueFull:
                    await asyncio.to_thread(self._add, job, request.inputs)
            future = self.scheduler.future(job, request.finish, request.remap_error)
            return await asyncio.wrap_future(future)
        except LlamaError as error:
            if error.rows is None:
                await asyncio.to_thread(_stop, job, request, error)
            raise
        except BaseException:
            if job is not None:
                job.cancel(wait=False)  # also wakes the thread that may wait for room
            raise
        finally:
            self._end()

    def stream(self, requests: Iterable[Request]) -> Iterator[Any]:
        """Yield the results of requests in order; a few are queued ahead.

        A request that fails raises when its turn has come, after the results before it. So does
        the iterable itself.
        """
        ahead: deque[Future[Any]] = deque()
        upcoming = iter(requests)
        failed: Future[Any] | None = None
        try:
            while failed is None:
                try:
                    if (request := next(upcoming, None)) is None:
                        break
                    ahead.append(self.submit(request))
                except Exception as error:
                    failed = concurrent.futures.Future()
                    failed.set_exception(error)
                    ahead.append(failed)
                if len(ahead) >= STREAM_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    # ---------------------------------------------------------------------- what they share

    def _add(
        self,
        job: Job,
        inputs: Inputs,
        *,
        block: bool = True,
        deadline: float | None = None,
        show: Callable[[int], None] | None = None,
    ) -> None:
        """Queue what a job lacks of its inputs, step by step."""
        for start in range(job.n_added, len(inputs), TEXTS_PER_STEP):
            step = inputs[start : start + TEXTS_PER_STEP]
            job.add(step, block=block, deadline=deadline)
            if show is not None:
                show(job.n_done)
            self._calibrate(len(step))

    def _begin(self) -> None:
        if self._calibration is None:
            return
        with self._lock:
            if self._n_running == 0:
                self._n_texts = 0
            self._n_running += 1

    def _end(self) -> None:
        """Where nothing runs any more, go back from a size that was tried to the usual one."""
        if self._calibration is None:
            return
        with self._lock, contextlib.suppress(ClosedError):
            self._n_running -= 1
            if self._n_running == 0:
                self.scheduler.pack_tokens = self.layouts[0].pack_tokens

    def _calibrate(self, n_texts: int) -> None:
        """Let a long run of texts find the best size of a pack on its way."""
        if self._calibration is None:
            return
        with self._lock:
            self._n_texts += n_texts
            if self._calibration is None or self._n_texts < CALIBRATION_TEXTS:
                return
            if (found := self._calibration.step()) is not None:
                self._settle(self._calibration, found)

    def _settle(self, calibration: tuning.Calibration, pack_tokens: int) -> None:
        """Use and remember what was found; a quieter measurement of before may still win."""
        self._calibration = None
        entry = tuning.remember_pack(
            self.models[0],
            self._on_gpu,
            pack_tokens,
            n_packs=calibration.n_packs,
            noise=calibration.noise,
        )
        self.scheduler.pack_tokens = entry.layout.pack_tokens
        self.layouts = [replace(self.layouts[0], pack_tokens=self.scheduler.pack_tokens)]
        self.layout_sources = [{**self.layout_sources[0], "pack_tokens": f"measured on {entry}"}]


def _stop(job: Job | None, request: Request, error: BaseException) -> None:
    """End a job whose call failed, and give the error what had been computed by then."""
    if job is not None:
        job.cancel()  # until this returns, workers may still write rows
    if isinstance(error, LlamaError):
        if job is not None:
            error.rows, error.done = job.rows, job.done
        request.remap_error(error)


@contextlib.contextmanager
def _progress_bar(n_texts: int | None) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar and yield what updates it to a number of texts; else yield None."""
    if n_texts is None:
        yield None
        return
    with require("tqdm", extra="progress").tqdm(total=n_texts) as bar:
        yield lambda n_done: bar.update(n_done - bar.n)


def _backends(models: list[Model], on_gpu: list[bool]) -> list[str]:
    """Return what computes these models: kinds of GPU, sets of kernels, or ggml."""
    gpus = [device["name"] for device in devices() if device["type"] in ("GPU", "IGPU")]
    found = set()
    for model, gpu in zip(models, on_gpu, strict=True):
        if gpu:
            found.add((model.device or gpus[0]).rstrip("0123456789").upper())
        elif model.cpu_backend == "ggml":
            found.add("ggml")
        else:
            found.add(f"{model.cpu_backend} {kernels()}")
    return sorted(found)
