"""Measure one model, or two sides in turn: two models, or two builds of llamacrab."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamacrab._support.hardware import cpu_features, usable_cpus
from llamacrab.bench import statistics, workloads
from llamacrab.errors import BenchError, InputError

VERSION = 1
# Rows and columns of the product that tells how fast the machine is just now.
REFERENCE = 768
# How often what looks slower must look so again.
CONFIRMATIONS = 2


def ask(worker: subprocess.Popen[str], command: dict[str, Any]) -> dict[str, Any]:
    """Send a worker a line of JSON, and return the one it answers; its key "error" if it ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(command) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    answer: dict[str, Any] = (
        json.loads(line) if line else {"error": f"the worker ended with code {worker.wait()}"}
    )
    return answer


class Side:
    """A worker process with a model.

    Parameters
    ----------
    label : str
        What to call it.
    python : str
        The interpreter whose llamacrab is measured.
    model : str or None
        The GGUF.
    seconds : float
        About how long a run of a case takes.
    **how
        What `Llama` is made with.
    """

    def __init__(self, label: str, python: str, model: str | None, seconds: float, **how: Any):
        self.label = label
        self._look = min(0.1, seconds)
        self._process = subprocess.Popen(
            [python, "-m", "llamacrab.bench.worker"],
            # Not from here, where a checkout of the sources could be mistaken for the package.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        model = None if model is None else str(Path(model).absolute())
        self.about = self._ask({"model": model, "seconds": seconds, "how": how})
        self.samples: dict[str, list[dict[str, Any]]] = {name: [] for name in self.about["cases"]}

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        answer = ask(self._process, command)
        if "error" in answer:
            raise BenchError(f"{self.label}: {answer['error']}")
        return answer

    def measure(self, case: str) -> None:
        """Run a case once, between two looks at how fast the machine is."""
        before = reference(self._look)
        sample = self._ask({"case": case})
        sample["gemm"] = (before + reference(self._look)) / 2
        self.samples[case].append(sample)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def result(self) -> dict[str, Any]:
        """Return all that was measured."""
        return {
            "label": self.label,
            "about": self.about,
            "peak_rss": self._ask({})["peak_rss"],
            "cases": {
                name: _case(samples, self.about["flops_per_token"])
                for name, samples in self.samples.items()
                if samples
            },
        }


def _case(samples: list[dict[str, Any]], flops_per_token: float) -> dict[str, Any]:
    rates = np.array([sample["n"] / sample["seconds"] for sample in samples])
    tokens = np.array([sample["n_tokens"] / sample["seconds"] for sample in samples])
    gemm = np.array([sample["gemm"] for sample in samples])
    calls = [seconds for sample in samples for seconds in sample["latencies"]]
    return {
        "n": samples[0]["n"],
        "n_tokens": samples[0]["n_tokens"],
        "rates": rates.tolist(),
        "gemm": gemm.tolist(),
        "tokens_per_second": float(np.median(tokens)),
        "gemm_share": float(np.median(tokens * flops_per_token / gemm)),
        "latency_ms": statistics.percentiles(calls) if calls else None,
    }


def reference(seconds: float = 0.1) -> float:
    """Return how many floating point operations a second a float32 matrix product of numpy's makes.

    With all threads of its BLAS: it stands for the machine as it is just now, with whatever else
    runs on it.
    """
    a = np.full((REFERENCE, REFERENCE), 0.5, dtype=np.float32)
    n, start, taken = 0, time.perf_counter(), 0.0
    while taken < seconds:
        a @ a
        n += 1
        taken = time.perf_counter() - start
    return 2 * REFERENCE**3 * n / taken


def run(
    model: str | os.PathLike[str] | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    cases: Sequence[str] = (),
    rounds: int = 5,
    seconds: float = 1.0,
    report: Callable[[str], Any] = lambda line: None,
    **how: Any,
) -> dict[str, Any]:
    """Measure, and return what was found, ready for JSON.

    Parameters
    ----------
    model : path, optional
        The GGUF; by default all-MiniLM-L6-v2.
    against : path, optional
        What to measure in turn with it: another GGUF, or the Python interpreter of an environment
        with another build of llamacrab.
    cases : sequence of str
        Which; by default all.
    rounds : int
        How often each case is run.
    seconds : float
        About how long a run takes.
    report : callable
        Called with a line for every round.
    **how
        What `Llama` is made with.

    Raises
    ------
    BenchError
        A worker failed.
    InputError
        There is no such case.
    """
    model = None if model is None else os.fspath(model)
    specs = [("this", sys.executable, model)]
    if against is not None:
        other = os.fspath(against)
        # Not resolved: the python of a virtual environment is a link out of it.
        is_model = other.lower().endswith(".gguf")
        specs.append((other, sys.executable if is_model else other, other if is_model else model))
    sides: list[Side] = []
    try:
        for label, python, path in specs:
            sides.append(Side(label, python, path, seconds, **how))
        common = [name for name in sides[0].samples if name in sides[-1].samples]
        unknown = set(cases) - set(common)
        if unknown:
            raise InputError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(common)}")
        chosen = [name for name in common if not cases or name in cases]
        for i in range(rounds + 1):
            for name in chosen:
                for side in sides if i % 2 else sides[::-1]:
                    side.measure(name)
            if not i:  # warm: page faults, buffers, caches, and how many texts to take
                for side in sides:
                    side.samples = {name: [] for name in side.samples}
            else:
                report(f"round {i} of {rounds}")
        found = [side.result() for side in sides]
    finally:
        for side in sides:
            side.close()
    return {
        "version": VERSION,
        "texts": workloads.source(),
        "machine": {
            "cpu": _cpu_name(),
            "cpus": usable_cpus(),
            "features": cpu_features(),
            "system": platform.platform(),
        },
        "sides": found,
    }


def compare(new: dict[str, Any], old: dict[str, Any] | None) -> dict[str, statistics.Ratio]:
    """Return for each case the rate of `new` over that of `old`.

    Without `old`, that of its first side over that of its second.

    Two sides of one run were taken in turn, and are compared round by round. An older result was
    taken at another time, when the machine may have been slower or faster: the rates are compared
    as they are, and relative to how fast the machine was around each of them, and what speaks for
    the new result is returned. So only what is slower both ways is called slower.

    Raises
    ------
    BenchError
        The results are not comparable.
    """
    if old is None:
        a, b = new["sides"]
        return {
            name: statistics.paired(case["rates"], b["cases"][name]["rates"])
            for name, case in a["cases"].items()
        }
    if old.get("version") != VERSION:
        raise BenchError("the old result was written by another version of llamacrab bench")
    for what, there, here in (
        ("texts", old["texts"], new["texts"]),
        ("machine", old["machine"]["cpu"], new["machine"]["cpu"]),
    ):
        if there != here:
            raise BenchError(f"the old result is for another {what}: {there}, not {here}")
    a, b = new["sides"][0], old["sides"][0]
    return {
        name: max(
            statistics.unpaired(case["rates"], b["cases"][name]["rates"]),
            statistics.unpaired(_relative(case), _relative(b["cases"][name])),
            key=lambda ratio: ratio.high,
        )
        for name, case in a["cases"].items()
        if name in b["cases"]
    }


def slower(
    ratios: dict[str, statistics.Ratio],
    bound: float,
    again: Callable[[list[str]], dict[str, statistics.Ratio]],
) -> dict[str, statistics.Ratio]:
    """Return the cases that are surely slower than `bound`, each time that one looks.

    Noise of a busy machine comes in spells, which a few rounds may all fall into. So what looks
    slower is measured twice more, by `again`, in new processes, and must look so each time.
    """
    found = {name: ratio for name, ratio in ratios.items() if ratio.is_below(bound)}
    for _ in range(CONFIRMATIONS):
        if found:
            found = {
                name: ratio for name, ratio in again(list(found)).items() if ratio.is_below(bound)
            }
    return found


def _relative(case: dict[str, Any]) -> np.ndarray:
    relative: np.ndarray = np.divide(case["rates"], case["gemm"])
    return relative


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
