"""The scheduler's queue alone: `tests/native/queue.cpp`, compiled with the queue and run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "tests/native/queue.cpp", ROOT / "llamacrab/native/queue.cpp"]
NAMES = re.findall(r"^TEST\((\w+)\)", SOURCES[0].read_text(encoding="utf-8"), re.MULTILINE)
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"there is no C++ compiler {COMPILER[0]}")
    path = tmp_path_factory.mktemp("queue") / "queue"
    # The library's checks of ranges and iterators are on.
    flags = ["-std=c++17", "-O0", "-g", "-Wall", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
    command = [*COMPILER, *flags, *map(str, SOURCES), "-o", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_queue(program, name):
    run = subprocess.run([program, name], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
