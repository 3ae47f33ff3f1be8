"""What this machine has, and what this process may use of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llamacrab._core import available_memory, cgroup_cpus, devices, usable_cpus

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["available_memory", "cgroup_cpus", "cpu_features", "has_gpu", "usable_cpus"]

# What decides how fast ggml's CPU code can be; features that it never uses are not listed.
# fmt: off
CPU_FEATURES = (
    "ssse3", "avx", "f16c", "fma", "avx2", "bmi2", "avx_vnni", "avx512f", "avx512vl", "avx512bw",
    "avx512dq", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2", "bf16",
)
# fmt: on


def cpu_features(root: str = "/") -> list[str]:
    """Return which of `CPU_FEATURES` this CPU has; empty where the system does not tell."""
    try:
        lines = Path(root, "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    has: set[str] = set()
    for line in lines:
        if line.startswith(("flags", "Features")):
            has.update(line.partition(":")[2].split())
            break
    return [feature for feature in CPU_FEATURES if feature in has]


def has_gpu(names: Sequence[str] | None = None) -> bool:
    """Return whether llama.cpp sees a GPU, or whether these devices are any."""
    wanted = None if names is None else {name.lower() for name in names}
    return any(
        device["type"] in ("GPU", "IGPU") and (wanted is None or device["name"].lower() in wanted)
        for device in devices()
    )
