"""Everything at once: see stress.py, which also runs under sanitizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_callers_of_every_kind_at_once_get_right_rows_or_typed_errors():
    script = Path(__file__).resolve().parent / "stress" / "stress.py"
    run = subprocess.run(
        [sys.executable, script, "--seconds", "4"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
