"""Measure which layout is fastest: all of them with `tune`, packs alone while a job runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from llamacrab._core import Model, PoolingType, Scheduler, Tokenization
from llamacrab._support.extras import require
from llamacrab.errors import AllocationError
from llamacrab.tuning.cost_model import best_pack, fit, spread_of
from llamacrab.tuning.layout import PACKS_CPU, PACKS_GPU, Layout, layouts
from llamacrab.tuning.store import QUIET

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """What one layout with one size of pack came to."""

    layout: Layout
    tokens_per_second: float
    seconds_per_pack: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes
    ----------
    best : Layout
        The fastest.
    table : list of Measurement
        Everything that was measured, in order.
    fits : dict
        For every (n_contexts, n_threads, flash_attn) the a, b, c of the cost model.
    n_packs : int
        Packs that were computed with the contexts and threads of the best.
    noise : float
        How far apart those of one size were; see `Entry`.
    """

    best: Layout
    table: list[Measurement] = field(default_factory=list)
    fits: dict[tuple[int, int, bool | str], tuple[float, float, float]] = field(
        default_factory=dict
    )
    n_packs: int = 0
    noise: float = 0.0


class Calibration:
    """Finds the best pack while a large job runs, from the packs of the job itself.

    Nothing is computed for its sake: it varies the size of the job's own packs, fits the cost
    model to what they took, and settles. It leaves contexts and threads alone; `tune` tries those.
    While something else wants the machine, it goes on, up to `ROUNDS_MAX` times through all sizes.

    Parameters
    ----------
    scheduler : Scheduler
        Whose packs to vary.

    Attributes
    ----------
    n_packs : int
        Packs that were measured.
    noise : float
        How far apart packs of one size were, or the part of the CPU that others took; see `Entry`.
    """

    PACKS_EACH = 8
    ROUNDS_MIN = 2
    ROUNDS_MAX = 5

    def __init__(self, scheduler: Scheduler) -> None:
        most = scheduler.context.n_ubatch
        self._on_cpu = most <= PACKS_CPU[-1] or scheduler.pack_tokens <= PACKS_CPU[-1]
        sizes = PACKS_CPU if self._on_cpu else PACKS_GPU
        self._scheduler = scheduler
        # There may be none: then packs are as large as they can be.
        self._sizes = [size for size in sizes if size <= most] or [most]
        self._left: list[int] = []
        self._rounds: list[tuple[int, float]] = []  # packs and CPU seconds before each round
        self._seen = self._n_packs()
        self.n_packs = 0
        self.noise = float("inf")

    def step(self) -> int | None:
        """Go on to the next size once this one has had its packs; return the best at the end."""
        n_packs = self._n_packs()
        if n_packs < self._seen + self.PACKS_EACH * self._scheduler.n_contexts:
            return None
        self._seen = n_packs
        if not self._left:
            if len(self._rounds) >= self.ROUNDS_MIN:
                # The last rounds only: something that wanted the machine before may have ended.
                first, cpu_seconds = self._rounds[-self.ROUNDS_MIN]
                packs = self._measured(n_packs - first)
                self.n_packs = len(packs)
                self.noise = max(spread_of(packs), self._taken_by_others(packs, cpu_seconds))
                if self.noise <= QUIET or len(self._rounds) >= self.ROUNDS_MAX:
                    return self._settle(packs)
            self._rounds.append((n_packs, time.process_time()))
            self._left = list(self._sizes)
        self._scheduler.pack_tokens = self._left.pop()
        return None

    def _measured(self, n: int) -> np.ndarray:
        """Return the last `n` packs, without single long texts and those that had more threads."""
        packs = _with_their_own_threads(self._scheduler.recent_packs()[-n:])
        return packs[(packs["n_tokens"] > 0) & (packs["n_tokens"] <= self._sizes[-1])]

    def _taken_by_others(self, packs: np.ndarray, cpu_seconds: float) -> float:
        """Return the part of the workers' time, since then, in which they did not compute."""
        if not self._on_cpu or self._scheduler.context.n_threads > 1:
            return 0.0  # there, waiting is part of computing
        wanted = float(packs["seconds"].sum())
        got = time.process_time() - cpu_seconds
        return max(0.0, 1 - got / wanted) if wanted > 0 else 1.0

    def _settle(self, packs: np.ndarray) -> int:
        sizes = packs["n_tokens"] if len(packs) else np.array(self._sizes)
        most = max(self._sizes[0], 8 * int(sizes.max() // 8))
        fits = len(np.unique(sizes)) >= 3
        found = best_pack(*fit(packs), least=self._sizes[0], most=most) if fits else most
        self._scheduler.pack_tokens = found
        return found

    def _n_packs(self) -> int:
        return sum(worker["packs"] for worker in self._scheduler.stats()["workers"])


def tune(
    model: Model,
    *,
    on_gpu: bool = False,
    n_tokens: int = 24,
    seconds: float = 0.5,
    report: Callable[[Measurement], None] | None = None,
) -> Tuning:
    """Measure every layout with every size of pack, and return the fastest.

    Parameters
    ----------
    model : Model
        The model.
    on_gpu : bool
        Whether its layers are on a GPU.
    n_tokens : int
        Mean length of the texts to measure with; they vary from half to one and a half of it.
    seconds : float
        How long each measurement takes at least.
    report : callable, optional
        Called with every `Measurement` as it is made.
    """
    packs = PACKS_GPU if on_gpu else PACKS_CPU
    rng = np.random.default_rng(0)
    limit = min(model.n_ctx_train, packs[-1])
    tried = list(layouts(on_gpu, model.cpu_backend))
    most = max(layout.n_contexts for layout in tried)
    n_texts = _n_texts(packs[-1], most, n_tokens)
    lengths = rng.integers(max(1, n_tokens // 2), n_tokens * 3 // 2 + 1, size=n_texts)
    texts = [
        rng.integers(0, len(model.vocab), size=min(int(n), limit), dtype=np.int32) for n in lengths
    ]
    table: list[Measurement] = []
    packs_of = {}
    for layout in tried:
        scheduler, fitting = _largest(model, layout, packs, limit)
        tokenization = Tokenization(model.vocab, limit=limit)
        given = [text[: fitting[-1]] for text in texts]
        try:
            _run(
                scheduler, tokenization, given[:64], 0
            )  # first decodes plan buffers and touch memory
            for pack_tokens in fitting:
                scheduler.pack_tokens = pack_tokens
                n_texts = _n_texts(pack_tokens, layout.n_contexts, n_tokens)
                rate = _run(scheduler, tokenization, given[:n_texts], seconds)
                per_pack = pack_tokens * layout.n_contexts / rate
                table.append(Measurement(replace(layout, pack_tokens=pack_tokens), rate, per_pack))
                if report:
                    report(table[-1])
            packs_of[layout.n_contexts, layout.n_threads, layout.flash_attn] = (
                _with_their_own_threads(scheduler.recent_packs())
            )
        finally:
            scheduler.close()
    best = max(table, key=lambda m: m.tokens_per_second).layout
    measured = packs_of[best.n_contexts, best.n_threads, best.flash_attn]
    fits = {name: fit(found) for name, found in packs_of.items()}
    return Tuning(best, table, fits, n_packs=len(measured), noise=spread_of(measured))


def _with_their_own_threads(packs: np.ndarray) -> np.ndarray:
    """Return the packs for which no idle worker lent its threads."""
    if len(packs) == 0:
        return packs
    own: np.ndarray = packs[packs["n_threads"] == packs["n_threads"].min()]
    return own


def _n_texts(pack_tokens: int, n_contexts: int, n_tokens: int) -> int:
    """Return how many texts give each context four packs or more, so that no worker waits long."""
    return max(64, 4 * pack_tokens * n_contexts // n_tokens)


def _largest(
    model: Model, layout: Layout, packs: tuple[int, ...], limit: int
) -> tuple[Scheduler, tuple[int, ...]]:
    """Return a scheduler for the largest packs that the device has memory for, and those packs."""
    while True:
        most = packs[-1]
        try:
            return Scheduler(
                model,
                n_contexts=layout.n_contexts,
                pack_tokens=most,
                n_ctx=min(limit, most) if model.has_position_table else most,
                n_batch=most,
                n_ubatch=most,
                n_seq_max=min(256, most // 4),
                n_threads=layout.n_threads,
                flash_attn=layout.flash_attn,
                pooling_type=PoolingType.UNSPECIFIED,
            ), packs
        except AllocationError:
            packs = packs[:-1]
            if not packs:
                raise


def _run(
    scheduler: Scheduler, tokenization: Tokenization, texts: list[np.ndarray], seconds: float
) -> float:
    """Compute the texts again and again for `seconds`, and return tokens per second."""
    n_tokens = 0
    start = time.perf_counter()
    while not n_tokens or time.perf_counter() - start < seconds:
        job = scheduler.job(tokenization, len(texts), dedup=False)
        job.add(texts)
        job.seal()
        job.wait()
        n_tokens += sum(map(len, texts))
    return n_tokens / (time.perf_counter() - start)


def plot(tuning: Tuning, path: Path) -> None:
    """Draw tokens per second over tokens per pack, a line for every layout (extra ``plot``)."""
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("agg")
    figure, axes = require("matplotlib.pyplot", extra="plot").subplots(figsize=(7, 4.5))
    lines: dict[str, list[Measurement]] = {}
    for one in tuning.table:
        name = f"{one.layout.n_contexts} x {one.layout.n_threads}"
        lines.setdefault(f"{name}, flash_attn={one.layout.flash_attn}", []).append(one)
    for name, line in lines.items():
        sizes = [one.layout.pack_tokens for one in line]
        axes.plot(sizes, [one.tokens_per_second for one in line], marker="o", label=name)
    axes.set(xlabel="tokens per pack", ylabel="tokens per second", title="contexts x threads")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
