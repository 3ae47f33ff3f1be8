"""The layout, contexts, threads and tokens per pack: what was given, measured or guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llamacrab._support.hardware import usable_cpus
from llamacrab.errors import ContextError

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
    """How a model is computed. Zero, and "auto", mean: not said."""

    n_contexts: int = 0
    n_threads: int = 0
    pack_tokens: int = 0
    flash_attn: bool | str = "auto"

    def said(self) -> dict[str, Any]:
        """Return the fields that are said."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value != "auto" and (value or value is False)
        }


def choose(
    known: Layout | None,
    *,
    on_gpu: bool,
    given: Layout,
    n_replicas: int = 1,
    cpu_backend: str = "ggml",
    n_cpus: int = 0,
) -> Layout:
    """Return the layout to use: what was given wins, then what is known, then a guess.

    It is that of each replica; they share the CPUs, `n_cpus` in all, or all that are usable.
    """
    kept = _kept(known, given, n_replicas, n_cpus)
    return guess(
        on_gpu=on_gpu,
        given=replace(kept, **given.said()),
        n_replicas=n_replicas,
        cpu_backend=cpu_backend,
        n_cpus=n_cpus,
    )


def _kept(known: Layout | None, given: Layout, n_replicas: int, n_cpus: int) -> Layout:
    """Return what is used of a known layout, unless it is given."""
    if known is None:
        return Layout()
    if given.n_contexts or given.n_threads or n_replicas > 1 or n_cpus:
        # A pack's best size was measured for other contexts: keep that, but not their number.
        return replace(known, n_contexts=0, n_threads=0)
    return known


def sources(
    known: Layout | None,
    *,
    given: Layout,
    measured: str = "",
    n_replicas: int = 1,
    n_cpus: int = 0,
) -> dict[str, str]:
    """Return where `choose` takes each field of a layout from.

    Parameters
    ----------
    known, given, n_replicas, n_cpus
        As for `choose`.
    measured : str
        When `known` was measured.

    Returns
    -------
    dict of str to str
        For each field of `Layout` "given", "measured on ..." or "guess".
    """
    kept = _kept(known, given, n_replicas, n_cpus).said()
    found = {}
    for name in asdict(given):
        if name in given.said() or (n_cpus and name in ("n_contexts", "n_threads")):
            found[name] = "given"
        else:
            found[name] = f"measured on {measured}" if name in kept else "guess"
    return found


def guess(
    *,
    on_gpu: bool,
    given: Layout,
    n_replicas: int = 1,
    cpu_backend: str = "ggml",
    n_cpus: int = 0,
) -> Layout:
    """Return a layout made of what was given and, for the rest, what is usually good.

    On a CPU that is one thread per context: threads that share a pack wait for each other at every
    operation.

    Raises
    ------
    ContextError
        Contexts and threads need more CPUs than `n_cpus`.
    """
    if n_cpus < 0:
        raise ContextError(f"n_cpus must not be negative, as {n_cpus} is")
    cpus = max(1, (n_cpus or usable_cpus()) // n_replicas)
    n_contexts = given.n_contexts or (
        1 if on_gpu else max(1, min(N_CONTEXTS_MAX, cpus // (given.n_threads or 1)))
    )
    n_threads = given.n_threads or max(1, cpus // n_contexts)
    if n_cpus and n_replicas * n_contexts * n_threads > n_cpus:
        copies = f"{n_replicas} devices x " if n_replicas > 1 else ""
        raise ContextError(
            f"{copies}{n_contexts} contexts x {n_threads} threads need "
            f"{n_replicas * n_contexts * n_threads} CPUs, and n_cpus={n_cpus} allows fewer: give "
            "one or the other"
        )
    usual = PACK_TOKENS_CPU if cpu_backend == "ggml" else PACK_TOKENS_KERNELS
    return replace(
        given,
        n_contexts=n_contexts,
        n_threads=n_threads,
        pack_tokens=given.pack_tokens or (PACK_TOKENS_GPU if on_gpu else usual),
    )


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
