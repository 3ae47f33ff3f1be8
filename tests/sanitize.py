"""Build llamacrab with a sanitizer, and run `stress.py` under it.

    python tests/sanitize.py thread|address [--seconds 60]

Under ThreadSanitizer llama.cpp is instrumented as well: it must see both sides of a race. Under
AddressSanitizer only our own code is, which makes the build short; what llama.cpp allocates is
watched all the same where we touch it.

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
from pathlib import Path

# Reports that say nothing of us: glibc frees the thread-local memory of a thread that has ended
# when it gives its stack to a new one, ordered by a lock that the sanitizer does not see.
SUPPRESSIONS = "race:_dl_deallocate_tls\n"

ROOT = Path(__file__).resolve().parents[1]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizer", choices=OPTIONS)
    parser.add_argument("--seconds", type=float, default=60)
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
            kind["variable"]: f"{kind['options']} suppressions={suppressions}",
        }
        status = 0
        for n_threads in (1, 2):
            command = ["setarch", platform.machine(), "-R", python, ROOT / "tests" / "stress.py"]
            command += ["--seconds", str(args.seconds), "--threads", str(n_threads)]
            run = subprocess.run(command, env=environment, cwd=folder, check=False)
            print(f"{args.sanitizer}, {n_threads} threads a context: exit code {run.returncode}")
            status = status or run.returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
