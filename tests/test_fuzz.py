"""A few of the cases of tests/fuzz, which runs by the million, but not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz" / "run.py"


@pytest.mark.parametrize(("kind", "count"), [("inputs", 600), ("ggufs", 150)])
def test_hostile_cases_neither_end_nor_stop_a_process(kind, count):
    done = subprocess.run(
        [sys.executable, RUN, kind, "--seed", "1", "--count", str(count)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{count} of {count}" in done.stdout
