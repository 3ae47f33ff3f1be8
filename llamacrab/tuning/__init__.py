"""How many contexts, threads and tokens a pack: measured, remembered, or guessed.

The cost of a pack of n tokens is modelled as ``a + b n + c n**2`` seconds: a fixed part, the matrix
products, and an encoder's attention, which spans the whole pack. Seconds a token are least at
``n = sqrt(a / c)``.
"""

from llamacrab.tuning.measure import (
    N_CONTEXTS_MAX,
    PACK_TOKENS_CPU,
    PACK_TOKENS_GPU,
    PACK_TOKENS_KERNELS,
    PACKS_CPU,
    PACKS_GPU,
    Calibration,
    Layout,
    Measurement,
    Tuning,
    backends,
    best_pack,
    cgroup_cpus,
    choose,
    content_key,
    fit,
    guess,
    has_gpu,
    key,
    layouts,
    plot,
    remember,
    remembered,
    tune,
    usable_cpus,
)

__all__ = [
    "N_CONTEXTS_MAX",
    "PACKS_CPU",
    "PACKS_GPU",
    "PACK_TOKENS_CPU",
    "PACK_TOKENS_GPU",
    "PACK_TOKENS_KERNELS",
    "Calibration",
    "Layout",
    "Measurement",
    "Tuning",
    "backends",
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
    "remember",
    "remembered",
    "tune",
    "usable_cpus",
]
