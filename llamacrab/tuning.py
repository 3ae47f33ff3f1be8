"""How many contexts, threads and tokens a pack: measured, remembered, or guessed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llamacrab._core import default_n_threads, devices

if TYPE_CHECKING:
    from llamacrab._core import Model

# Guesses, where nothing has been measured. On a CPU an encoder's attention spans the whole pack, so
# that larger packs cost more a token; a GPU wants all it can get.
PACK_TOKENS_CPU = 192
PACK_TOKENS_GPU = 4096
# More contexts than this cost memory that a guess should not take.
N_CONTEXTS_MAX = 16


@dataclass(frozen=True)
class Layout:
    """How a model is computed. Zero means: not said."""

    n_contexts: int = 0
    n_threads: int = 0
    pack_tokens: int = 0
    flash_attn: bool | str = "auto"


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


def has_gpu() -> bool:
    """Return whether llama.cpp sees a GPU."""
    return any(device["type"] in ("GPU", "IGPU") for device in devices())


def guess(*, n_ctx: int, on_gpu: bool, given: Layout) -> Layout:
    """Return a layout made of what was given and, for the rest, what is usually good."""
    cpus = usable_cpus()
    if on_gpu:
        n_contexts = given.n_contexts or 1
    elif given.n_contexts:
        n_contexts = given.n_contexts
    else:
        n_contexts = max(1, min(N_CONTEXTS_MAX, cpus // (given.n_threads or 1)))
    return replace(
        given,
        n_contexts=n_contexts,
        n_threads=given.n_threads or max(1, cpus // n_contexts),
        pack_tokens=given.pack_tokens or (PACK_TOKENS_GPU if on_gpu else PACK_TOKENS_CPU),
    )


def choose(model: Model, *, n_ctx: int, on_gpu: bool, given: Layout) -> Layout:
    """Return the layout for a model: what was given wins, then what was measured, then a guess."""
    return guess(n_ctx=n_ctx, on_gpu=on_gpu, given=given)
