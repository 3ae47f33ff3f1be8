"""Build llama.cpp's libraries with its own CMake, and keep them for the next build.

Meson calls this from a custom target. A finished build is kept in the user's cache under a key of
everything that shapes it, so that a fresh clone or virtual environment costs seconds; without that
cache it is made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fetch

# What a build that travels may use of an x86-64 CPU: those of 2013 and later have it. ggml's own
# default is the same, but nothing at all under SOURCE_DATE_EPOCH. GGML_NATIVE ignores these.
PORTABLE_X86 = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
COMPILER_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDAARCHS", "SOURCE_DATE_EPOCH")


def cmake_options(args: argparse.Namespace) -> dict[str, str]:
    """Say every option that we rely on: llama.cpp's defaults depend on where it is built."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_POSITION_INDEPENDENT_CODE": "ON",
        "CMAKE_CXX_VISIBILITY_PRESET": "hidden",
        "CMAKE_C_VISIBILITY_PRESET": "hidden",
        "BUILD_SHARED_LIBS": "OFF",
        "GGML_NATIVE": args.native,
        "GGML_OPENMP": args.openmp,
        "GGML_CCACHE": "OFF",
        "LLAMA_BUILD_NUMBER": "0",
        "LLAMA_BUILD_COMMIT": fetch.PIN["commit"],
        "LLAMA_BUILD_IS_DEV": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    if args.portable:
        options |= {
            "BUILD_SHARED_LIBS": "ON",
            "GGML_NATIVE": "OFF",
            "GGML_BACKEND_DL": "ON",
            "GGML_CPU_ALL_VARIANTS": "ON",
            # A wheel holds no links, so no libllama.so.0; and its libraries find each other.
            "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
            "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
            "CMAKE_INSTALL_RPATH": "$ORIGIN",
            "CMAKE_SHARED_LINKER_FLAGS": "-Wl,-Bsymbolic",
            "CMAKE_PROJECT_INCLUDE": str(Path(__file__).resolve().with_name("names.cmake")),
        }
    elif args.native == "OFF":
        options |= {f"GGML_{feature}": "ON" for feature in PORTABLE_X86}
    for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP"):
        options[f"LLAMA_BUILD_{part}"] = "OFF"
    for backend in ("blas", "cuda", "metal", "vulkan"):
        options[f"GGML_{backend.upper()}"] = "ON" if backend in args.backend else "OFF"
    if "blas" in args.backend:
        options["GGML_BLAS_VENDOR"] = "OpenBLAS"  # what meson.build links
    if "cuda" in args.backend:
        # Virtual memory needs the driver's library at load: without it, and so without a GPU, not
        # even the CPU could be used.
        options["GGML_CUDA_NO_VMM"] = "ON"
    if "metal" in args.backend:
        options["GGML_METAL_EMBED_LIBRARY"] = "ON"
    return options


def said(options: dict[str, str], extra: list[str]) -> list[str]:
    """Return the options that a bug report needs, as NAME=VALUE without spaces."""
    all_of_them = {name: value for name, value in options.items() if "GGML" in name}
    for argument in extra:
        name, equals, value = argument.removeprefix("-D").partition("=")
        if argument.startswith("-D") and equals:
            all_of_them[name.partition(":")[0]] = value
    return ["_".join(f"{name}={value}".split()) for name, value in all_of_them.items()]


def cache_key(options: dict[str, str], extra: list[str]) -> str:
    compiler = subprocess.run(
        [os.environ.get("CXX", "c++").split()[0], "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    parts = {
        "pin": fetch.PIN,
        "options": options,
        "extra": extra,
        "compiler": compiler.stdout,
        "environment": {name: os.environ.get(name) for name in COMPILER_VARIABLES},
        "machine": [platform.system(), platform.machine()],
        "cpu": _cpu() if options["GGML_NATIVE"] == "ON" else None,
        "script": Path(__file__).read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Name what GGML_NATIVE compiles for: a build for one CPU may not run on another."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    return platform.processor()


def build(options: dict[str, str], extra: list[str], scratch: Path, downloads: Path) -> Path:
    """Run CMake in `scratch` and return a folder with the archives, headers and licence."""
    source = fetch.source_tree(scratch / "source", downloads)
    binary = scratch / "build"
    configure = ["cmake", "-S", source, "-B", binary, "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    configure += extra  # the last one wins
    targets = ["llama"] if options["BUILD_SHARED_LIBS"] == "OFF" else ["llama", "all"]
    for command in (configure, ["cmake", "--build", binary, "--target", *targets]):
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"llama.cpp: CMake failed: {' '.join(map(str, command[:5]))} ...")

    staged = scratch / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "include").mkdir(parents=True)
    for pattern in ("*.a", "*.lib", "*.so"):
        for archive in binary.rglob(pattern):
            shutil.copy2(archive, staged)
    for folder in ("include", "ggml/include"):
        for header in (source / folder).glob("*.h"):
            shutil.copy2(header, staged / "include")
    # What a ggml backend is written against; llamacrab/kernels is one.
    for header in (source / "ggml" / "src").glob("ggml*-impl.h"):
        shutil.copy2(header, staged / "include")
    shutil.copy2(source / "LICENSE", staged / "LICENSE.llama.cpp")
    definitions = {
        "SOURCE": f"{fetch.PIN['name']} {fetch.PIN['version']}",
        "VERSION": fetch.PIN["llama_version"],
        "COMMIT": fetch.PIN["commit"],
        "OPTIONS": " ".join(said(options, extra)),
    }
    plugins = int(options.get("GGML_BACKEND_DL") == "ON")
    lines = [f"#define LLAMACRAB_LLAMA_{k} {json.dumps(v)}\n" for k, v in definitions.items()]
    lines.append(f"#define LLAMACRAB_LLAMA_PLUGINS {plugins}\n")
    (staged / "llamacrab_llama_build.h").write_text("".join(lines))
    return staged


def _writable(cache: Path) -> bool:
    """Return whether files can be made in a cache; where not, the build goes on without it."""
    try:
        for folder in ("builds", "downloads"):
            (cache / folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache / folder):
                pass
    except OSError:
        return False
    return True


def _keep(staged: Path, kept: Path) -> Path:
    """Copy a build into the cache; it appears there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".new-") as new:
        whole = Path(new) / "whole"
        shutil.copytree(staged, whole)
        try:
            whole.rename(kept)
        except OSError:  # another build of the same key was faster
            if not kept.is_dir():
                raise
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--native", choices=("ON", "OFF"), required=True)
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--openmp", choices=("ON", "OFF"), required=True)
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--cmake-arg", action="append", default=[])
    args = parser.parse_args()

    options = cmake_options(args)
    scratch = args.scratch.resolve()
    caches = [fetch.helper.cache_dir(), scratch / "cache"]
    key = cache_key(options, args.cmake_arg)
    kept = next((c / "builds" / key for c in caches if (c / "builds" / key).is_dir()), None)
    if kept is None:
        cache = next(filter(_writable, caches))
        try:
            staged = build(options, args.cmake_arg, scratch, cache / "downloads")
        except fetch.helper.FetchError as error:
            sys.exit(f"llama.cpp: {error}")
        kept = _keep(staged, cache / "builds" / key)
    shutil.copytree(kept, args.out, dirs_exist_ok=True, copy_function=shutil.copy)


if __name__ == "__main__":
    main()
