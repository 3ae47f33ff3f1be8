"""The side-by-side with other libraries: what of it runs without them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PEERS = Path(__file__).resolve().parents[1] / "bench" / "peers"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    return importlib.import_module


def found(rates: dict[str, list[float]]) -> dict:
    peers = {
        name: {"rates": each, "settings": f"as {name} is", "cosine": {"least": 0.99, "median": 1.0}}
        for name, each in rates.items()
    }
    return {
        "machine": {"cpu": "a CPU", "cpus": 2},
        "texts": "made-up sentences",
        "reference": "other",
        "about": dict.fromkeys(rates, "1.0"),
        "workloads": {"short": {"n": 20, "gemm": [1e11, 1.2e11], "peers": peers}},
    }


def test_two_llamacrabs_beside_each_other_from_the_command_line(tmp_path):
    command = [sys.executable, str(PEERS / "run.py"), "--only", "llamacrab", "--workload", "short"]
    command += ["--texts", "20", "--rounds", "3", "--json", str(tmp_path / "found.json")]
    command += ["--llamacrab", "f32", '{"outtype": "f32", "n_contexts": 1, "n_threads": 1}']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    short = json.loads((tmp_path / "found.json").read_text())["workloads"]["short"]
    assert set(short["peers"]) >= {"llamacrab", "f32", "llamacrab int8"}
    for peer in short["peers"].values():
        assert peer["cosine"]["least"] > 0.995
        assert len(peer["rates"]) == 3
        assert min(peer["rates"]) > 0
    assert "| **llamacrab** |" in run.stdout


def test_other_vectors_are_refused_before_anything_is_measured(module):
    run = module("run")
    rows = np.random.default_rng(3).normal(size=(9, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert run.cosines("same", rows, rows, 0.99)["least"] == pytest.approx(1, abs=1e-6)
    for wrong in (rows[::-1], rows * 2, rows[:8], rows.astype(np.float64), rows * np.nan):
        with pytest.raises(run.PeerError, match="vectors"):
            run.cosines("wrong", wrong, rows, 0.99)


def test_a_peer_that_fails_says_why(module, tmp_path):
    run = module("run")
    script = tmp_path / "with_nothing.py"
    script.write_text("class Peer:\n    def load(self, files):\n        raise OSError('no disk')\n")
    with pytest.raises(run.PeerError, match="broken: OSError: no disk"):
        run.Worker("broken", run.Peer(script, ""), sys.executable, {})
    script.write_text("import sys\nsys.exit('no such library')\n")
    with pytest.raises(run.PeerError, match="no such library"):
        run.Worker("gone", run.Peer(script, ""), sys.executable, {})


def test_the_page_says_who_is_faster_and_by_how_much(module, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    page = module("page")
    result = found({"llamacrab": [10.0, 11, 10], "fast": [20.0, 22, 20], "slow": [5.0, 5, 5]})
    page.write(result, tmp_path / "peers.md")
    text = (tmp_path / "peers.md").read_text()
    assert "fast is 2.00 times as fast; its least cosine is 0.990000" in text
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert cells[2:5] == ["fast", "**llamacrab**", "slow"]
    assert "<svg" in (tmp_path / "images" / "peers.svg").read_text()
    page.write(found({"llamacrab": [10.0, 11, 10], "slow": [5.0, 5, 5]}), tmp_path / "peers.md")
    assert "no peer is significantly faster" in (tmp_path / "peers.md").read_text()
