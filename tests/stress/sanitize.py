"""Build llamacrab with a sanitizer, and run `stress.py` under it.

    python tests/stress/sanitize.py thread|address [--seconds 60] [--kernels]

Under ThreadSanitizer llama.cpp is instrumented as well: it must see both sides of a race. Under
AddressSanitizer only our own code is, which makes the build short; what llama.cpp allocates is
watched all the same where we touch it.

With ``--kernels`` it runs `test_kernels.py` instead, for all kernels that this CPU can run.

Needs a compiler with its sanitizers, and what a build needs. ThreadSanitizer also wants a fixed
layout of memory, so the process is started through `setarch -R`.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

# Reports that say nothing of us: glibc frees the thread-local memory of a thread that has ended
# when it gives its stack to a new one, ordered by a lock that the sanitizer does not see.
SUPPRESSIONS = "race:_dl_deallocate_tls\n"

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    # The interpreter is not instrumented, but its locks are libc's, which the sanitizer follows.
    "thread": {
        "library": "libtsan.so",
        "variable": "TSAN_OPTIONS",
        "options": "halt_on_error=0 exitcode=66 second_deadlock_stack=1 history_size=7",
        "cmake": "THREAD",
        "meson": "thread",
    },
    "address": {
        "library": "libasan.so",
        "variable": "ASAN_OPTIONS",
        # What the interpreter leaves to the end of the process is not a leak.
        "options": "detect_leaks=0 exitcode=66 strict_string_checks=1",
        "cmake": "",
        "meson": "address,undefined",
    },
}


def install(kind: dict[str, str], folder: Path) -> Path:
    """Make an environment with a sanitized llamacrab and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    settings = {
        "b_sanitize": kind["meson"],
        "b_lundef": "false",
        "buildtype": "debugoptimized",
        "b_ndebug": "false",
    }
    if kind["cmake"]:
        flags = (f"-D{part}_SANITIZE_{kind['cmake']}=ON" for part in ("GGML", "LLAMA"))
        settings["llama-cmake-args"] = ",".join(flags)
    arguments = [f"-Csetup-args=-D{name}={value}" for name, value in settings.items()]
    command = [python, "-m", "pip", "install", "--quiet", *arguments, f"{ROOT}[test]"]
    subprocess.run(command, check=True)
    return python


def _find(library: str) -> str:
    command = ["c++", f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stress(seconds: float) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Yield what to run: a title, variables of the environment, arguments of Python."""
    for n_threads in (1, 2):
        command = [str(ROOT / "tests" / "stress" / "stress.py"), "--seconds", str(seconds)]
        yield f"{n_threads} threads a context", {}, [*command, "--threads", str(n_threads)]


def kernels() -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Yield the same for the tests of the kernels."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_kernels.py")]
    tiny = ["-k", "not minilm and not threads_of and not two_backends and not longer_than"]
    for name, some in (("generic", tiny), ("avx2", tiny), ("avx512_bf16", [])):
        yield f"kernels {name}", {"LLAMACRAB_KERNELS": name}, command + some


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizer", choices=OPTIONS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kernels", action="store_true", help="the tests of the kernels instead")
    args = parser.parse_args()
    kind = OPTIONS[args.sanitizer]
    # libstdc++ too: AddressSanitizer looks for what throws exceptions when the process starts.
    preloaded = " ".join(map(_find, (kind["library"], "libstdc++.so.6")))
    with tempfile.TemporaryDirectory() as folder:
        python = install(kind, Path(folder) / "venv")
        suppressions = Path(folder) / "suppressions"
        suppressions.write_text(SUPPRESSIONS if args.sanitizer == "thread" else "")
        environment = {
            **os.environ,
            "LD_PRELOAD": preloaded,
            "PYTHONMALLOC": "malloc",
            "UBSAN_OPTIONS": "halt_on_error=1 exitcode=66",
            kind["variable"]: f"{kind['options']} suppressions={suppressions}",
        }
        status = 0
        runs = kernels() if args.kernels else stress(args.seconds)
        for title, more, command in runs:
            whole = ["setarch", platform.machine(), "-R", python, *command]
            run = subprocess.run(whole, env=environment | more, cwd=folder, check=False)
            print(f"{args.sanitizer}, {title}: exit code {run.returncode}", flush=True)
            status = status or run.returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
