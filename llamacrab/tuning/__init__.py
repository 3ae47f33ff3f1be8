"""How many contexts, threads and tokens per pack: measured, remembered, or guessed."""

from llamacrab._support.hardware import cgroup_cpus, has_gpu, usable_cpus
from llamacrab.tuning.cost_model import best_pack, fit, spread_of
from llamacrab.tuning.layout import (
    N_CONTEXTS_MAX,
    PACK_TOKENS_CPU,
    PACK_TOKENS_GPU,
    PACK_TOKENS_KERNELS,
    PACKS_CPU,
    PACKS_GPU,
    Layout,
    choose,
    guess,
    layouts,
    sources,
)
from llamacrab.tuning.measure import Calibration, Measurement, Tuning, plot, tune
from llamacrab.tuning.store import (
    Entry,
    content_key,
    key,
    recall,
    remember,
    remember_pack,
    remembered,
)

__all__ = [
    "N_CONTEXTS_MAX",
    "PACKS_CPU",
    "PACKS_GPU",
    "PACK_TOKENS_CPU",
    "PACK_TOKENS_GPU",
    "PACK_TOKENS_KERNELS",
    "Calibration",
    "Entry",
    "Layout",
    "Measurement",
    "Tuning",
    "best_pack",
    "cgroup_cpus",
    "choose",
    "content_key",
    "fit",
    "guess",
    "has_gpu",
    "key",
    "layouts",
    "plot",
    "recall",
    "remember",
    "remember_pack",
    "remembered",
    "sources",
    "spread_of",
    "tune",
    "usable_cpus",
]
