"""Installed versions, build options, and the features of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from llamacrab import _core
from llamacrab._support.hardware import cpu_features, usable_cpus

__version__ = importlib.metadata.version("llamacrab")

GPU_BACKENDS = ("CUDA", "METAL", "VULKAN")


def check_abi() -> None:
    """Raise if libllama has another version than the headers that llamacrab was compiled with.

    llama.h passes its parameter structs by value: a mismatch would corrupt memory silently. Only a
    system library (``-Dsystem-llama=true``) can differ.

    Raises
    ------
    ImportError
        The versions differ.
    """
    info = _core.build_info()
    built_for, found = (info[key].removesuffix("-dev") for key in ("built_for", "version"))
    if built_for != found:
        raise ImportError(
            f"llamacrab was compiled for llama.cpp {built_for}, but the system's libllama is now "
            f"{found}: reinstall llamacrab (pip install --force-reinstall --no-cache-dir)"
        )


def _options(info: dict[str, str]) -> dict[str, str]:
    return dict(pair.removeprefix("-D").split("=", 1) for pair in info["options"].split())


def compiled_in(*backends: str) -> list[str]:
    """Return which of these ggml backends this build has."""
    options = _options(_core.build_info())
    return [name for name in backends if _on(options, name)]


def show_versions() -> None:
    """Print versions and build options, for a bug report."""
    info = _core.build_info()
    options = _options(info)
    rows = {
        "llamacrab": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "numpy": importlib.metadata.version("numpy"),
        "system": f"{platform.platform()}, {os.cpu_count()} CPUs, {usable_cpus()} usable",
        "llama.cpp": f"{info['version']} (commit {info['commit']}, from {info['source']})",
        "backends": ", ".join(["CPU", *compiled_in("BLAS", *GPU_BACKENDS)]),
        "kernels": _core.kernels() or "none: built with the system's libllama",
        "GGML_NATIVE": options.get("GGML_NATIVE", "unknown"),
        "build options": info["options"] or "unknown",
        "CPU compiled": _core.system_info(),
        "CPU present": " ".join(cpu_features()) or "unknown",
    }
    for i, device in enumerate(_core.devices()):
        free, total = device["memory_free"] >> 20, device["memory_total"] >> 20
        rows[f"device {i}"] = (
            f"{device['name']} ({device['type']}): {device['description']}, "
            f"{free} of {total} MiB free"
        )
    for name, value in rows.items():
        print(f"{name:14} {value}")


def _on(options: dict[str, str], backend: str) -> bool:
    return options.get(f"GGML_{backend}") == "ON"


check_abi()
