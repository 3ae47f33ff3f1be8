"""How many contexts, threads and tokens a pack: measured, remembered, or guessed.

The cost of a pack of n tokens is modelled as ``a + b n + c n**2`` seconds: a fixed part, the matrix
products, and an tokenization's attention, which spans the whole pack. Seconds a token are least at
``n = sqrt(a / c)``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._core import (
    Model,
    PoolingType,
    Scheduler,
    Tokenization,
    build_info,
    default_n_threads,
    devices,
    kernels,
)
from llamacrab._support.extras import require
from llamacrab._support.fetch import cache_dir
from llamacrab.errors import AllocationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Guesses, where nothing has been measured.
PACK_TOKENS_CPU = 192
PACK_TOKENS_KERNELS = 512  # attention that takes each text by itself does not mind large packs
PACK_TOKENS_GPU = 4096
# More contexts than this cost memory that a guess should not take.
N_CONTEXTS_MAX = 16
# Packs that are tried, in tokens.
PACKS_CPU = (64, 96, 128, 192, 256, 384, 512)
PACKS_GPU = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Layout:
    """How a model is computed. Zero means: not said."""

    n_contexts: int = 0
    n_threads: int = 0
    pack_tokens: int = 0
    flash_attn: bool | str = "auto"


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
    """

    best: Layout
    table: list[Measurement] = field(default_factory=list)
    fits: dict[tuple[int, int, bool | str], tuple[float, float, float]] = field(
        default_factory=dict
    )


# ------------------------------------------------------------------------------------ the machine


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, and its cgroup's quota."""
    cpus = default_n_threads()
    quota = cgroup_cpus()
    return max(1, cpus if quota is None else min(cpus, quota))


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the CPUs that the cgroup's quota allows, rounded up; None where there is no quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()  # cgroup v2
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return -(-int(quota) // int(period))


def has_gpu(names: Sequence[str] | None = None) -> bool:
    """Return whether llama.cpp sees a GPU, or whether these devices are any."""
    wanted = None if names is None else {name.lower() for name in names}
    return any(
        device["type"] in ("GPU", "IGPU") and (wanted is None or device["name"].lower() in wanted)
        for device in devices()
    )


def backends(models: Sequence[Model], on_gpu: Sequence[bool]) -> list[str]:
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


# ------------------------------------------------------------------------------------ choosing


def choose(
    known: Layout | None,
    *,
    on_gpu: bool,
    given: Layout,
    n_replicas: int = 1,
    cpu_backend: str = "ggml",
) -> Layout:
    """Return the layout to use: what was given wins, then what is known, then a guess.

    It is that of each replica; they share the CPUs.
    """
    known = known or Layout()
    if given.n_contexts or given.n_threads or n_replicas > 1:
        # A pack's best size was measured for other contexts: keep that, but not their number.
        known = replace(known, n_contexts=0, n_threads=0)
    return guess(
        on_gpu=on_gpu,
        given=Layout(
            given.n_contexts or known.n_contexts,
            given.n_threads or known.n_threads,
            given.pack_tokens or known.pack_tokens,
            known.flash_attn if given.flash_attn == "auto" else given.flash_attn,
        ),
        n_replicas=n_replicas,
        cpu_backend=cpu_backend,
    )


def guess(*, on_gpu: bool, given: Layout, n_replicas: int = 1, cpu_backend: str = "ggml") -> Layout:
    """Return a layout made of what was given and, for the rest, what is usually good.

    On a CPU that is one thread a context: threads that share a pack wait for each other at every
    operation.
    """
    cpus = max(1, usable_cpus() // n_replicas)
    n_contexts = given.n_contexts or (
        1 if on_gpu else max(1, min(N_CONTEXTS_MAX, cpus // (given.n_threads or 1)))
    )
    usual = PACK_TOKENS_CPU if cpu_backend == "ggml" else PACK_TOKENS_KERNELS
    return replace(
        given,
        n_contexts=n_contexts,
        n_threads=given.n_threads or max(1, cpus // n_contexts),
        pack_tokens=given.pack_tokens or (PACK_TOKENS_GPU if on_gpu else usual),
    )


# ------------------------------------------------------------------------------------ memory


def content_key(path: Path, size: int = 1 << 20) -> str:
    """Name a large file by its length, its beginning and its end.

    That is quick, and enough for what it is used for: a measurement that is taken for another
    model's costs speed, and changes no row. Elsewhere `_support.files.model_hashes` is used.
    """
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        digest.update(file.read(size))
        file.seek(max(0, length - size))
        digest.update(file.read(size))
    return digest.hexdigest()[:32]


def key(model: Model, on_gpu: bool) -> str:
    """Name what a measurement holds for: the model's content, the device, the build, the CPUs.

    And the kernels: with those that take each text by itself larger packs are faster. A device
    that was named has a measurement of its own.
    """
    digest = hashlib.sha256(content_key(Path(model.path)).encode())
    names = sorted(device["name"] + device["description"] for device in devices())
    info = build_info()
    how = usable_cpus(), on_gpu, (model.device or "").lower(), model.cpu_backend
    for part in (*names, info["commit"], info["options"], *how):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:32]


def _file() -> Path:
    return cache_dir() / "tuning.json"


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing measured yet, or a file of another kind
        return {}
    return known if isinstance(known, dict) else {}


def remembered(model: Model, on_gpu: bool) -> Layout | None:
    """Return the layout that was measured for this model here, if any."""
    if not _file().is_file():
        return None
    try:
        return Layout(**_read()[key(model, on_gpu)])
    except (KeyError, TypeError):
        return None


def remember(model: Model, on_gpu: bool, layout: Layout) -> None:
    """Keep a measured layout in the user's cache; a cache that cannot be written is no error."""
    known = _read() | {key(model, on_gpu): asdict(layout)}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_file().parent, prefix=".tuning.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file, indent=1)
        Path(name).replace(_file())
    except OSError:
        return


# ------------------------------------------------------------------------------------ measuring


def fit(packs: np.ndarray) -> tuple[float, float, float]:
    """Fit ``seconds = a + b n + c n**2`` to packs, each weighted by its own size.

    Parameters
    ----------
    packs : structured array
        Fields ``n_tokens`` and ``seconds``, of at least three different sizes.

    Returns
    -------
    a, b, c : float
        None is negative.
    """
    n = packs["n_tokens"].astype(float)
    seconds = packs["seconds"]
    # Seconds a token are what matters, and medians keep out packs that something else held up.
    sizes = np.unique(n)
    if len(sizes) > 64:
        edges = np.quantile(n, np.linspace(0, 1, 33))
        groups = [(n >= low) & (n <= high) for low, high in itertools.pairwise(edges)]
    else:
        groups = [n == size for size in sizes]
    x = np.array([np.median(n[group]) for group in groups if group.any()])
    y = np.array([np.median(seconds[group] / n[group]) for group in groups if group.any()])
    terms = np.stack([1 / x, np.ones_like(x), x], axis=1)
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(terms[:, kept], y, rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        del kept[int(np.argmin(found))]
    model = np.zeros(3)
    model[kept] = np.maximum(found, 0)
    return float(model[0]), float(model[1]), float(model[2])


def best_pack(a: float, b: float, c: float, *, most: int) -> int:
    """Return the pack, in tokens, at which ``a / n + b + c n`` is least, at most `most`."""
    if c <= 0:
        return most
    return int(min(most, max(32, 8 * round(math.sqrt(a / c) / 8))))


class Calibration:
    """Finds the best pack while a large job runs, from the packs of the job itself.

    Nothing is computed for its sake: it varies the size of the job's own packs, fits the cost
    model to what they took, and settles. It leaves contexts and threads alone; `tune` tries those.

    Parameters
    ----------
    scheduler : Scheduler
        Whose packs to vary.
    """

    PACKS_EACH = 8

    def __init__(self, scheduler: Scheduler) -> None:
        most = scheduler.context.n_ubatch
        sizes = PACKS_GPU if most > PACKS_CPU[-1] else PACKS_CPU
        self._scheduler = scheduler
        self._most = most
        self._left = [size for size in sizes if size <= most] * 2
        self._seen = self._n_packs()

    def step(self) -> int | None:
        """Go on to the next size once this one has had its packs; return the best at the end."""
        if self._n_packs() < self._seen + self.PACKS_EACH * self._scheduler.n_contexts:
            return None
        self._seen = self._n_packs()
        if self._left:
            self._scheduler.pack_tokens = self._left.pop()
            return None
        packs = self._scheduler.recent_packs()
        found = best_pack(*fit(packs[packs["n_tokens"] > 0]), most=self._most)
        self._scheduler.pack_tokens = found
        return found

    def _n_packs(self) -> int:
        return sum(worker["packs"] for worker in self._scheduler.stats()["workers"])


def layouts(on_gpu: bool, cpu_backend: str = "ggml") -> Iterator[Layout]:
    """Yield the layouts worth trying: the CPUs split into 1, 2, 4 ... contexts.

    llamacrab's own kernels have flash attention only.
    """
    cpus = usable_cpus()
    n_contexts = cpus
    while n_contexts >= 1:
        for flash_attn in (True, False) if cpu_backend == "ggml" else (True,):
            yield Layout(n_contexts, max(1, cpus // n_contexts), 0, flash_attn)
        if on_gpu and n_contexts > 2:
            n_contexts = 2
        else:
            n_contexts //= 2


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
    fits = {}
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
            fits[layout.n_contexts, layout.n_threads, layout.flash_attn] = fit(
                scheduler.recent_packs()
            )
        finally:
            scheduler.close()
    return Tuning(max(table, key=lambda m: m.tokens_per_second).layout, table, fits)


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
    """Compute the texts again and again for `seconds`, and return tokens a second."""
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
    """Draw tokens a second over tokens a pack, a line for every layout (extra ``plot``)."""
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
    axes.set(xlabel="tokens a pack", ylabel="tokens a second", title="contexts x threads")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
