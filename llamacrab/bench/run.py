"""Measure one model, or two sides alternately: two models, or two builds of llamacrab."""

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
# Rows and columns of the matrix product that measures the current speed of the machine.
REFERENCE = 768
# How often a slower case must be slower again.
CONFIRMATIONS = 2


def ask(worker: subprocess.Popen[str], command: dict[str, Any]) -> dict[str, Any]:
    """Send a worker a line of JSON, and return its answer, with the key "error" if it ended."""
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
        Name of the side.
    python : str
        The Python interpreter whose llamacrab is measured.
    model : str or None
        The GGUF.
    seconds : float
        Approximate duration of a run of a case.
    **llama_kwargs
        Keywords of `Llama`.
    """

    def __init__(
        self, label: str, python: str, model: str | None, seconds: float, **llama_kwargs: Any
    ):
        self.label = label
        self._reference_seconds = min(0.1, seconds)
        self._process = subprocess.Popen(
            [python, "-m", "llamacrab.bench.worker"],
            # Do not import llamacrab from the current folder, which may be a source checkout.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        model = None if model is None else str(Path(model).absolute())
        # The key "how" is part of the protocol: the other side may be an older build.
        self.about = self._ask({"model": model, "seconds": seconds, "how": llama_kwargs})
        self.samples: dict[str, list[dict[str, Any]]] = {name: [] for name in self.about["cases"]}

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        answer = ask(self._process, command)
        if "error" in answer:
            raise BenchError(f"{self.label}: {answer['error']}")
        return answer

    def measure(self, case: str) -> None:
        """Run a case once, and measure the speed of the machine before and after it."""
        before = reference(self._reference_seconds)
        sample = self._ask({"case": case})
        sample["gemm"] = (before + reference(self._reference_seconds)) / 2
        self.samples[case].append(sample)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def result(self) -> dict[str, Any]:
        """Return all measurements."""
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
    """Return the floating point operations per second of numpy's float32 matrix product.

    It uses all threads of the BLAS, and measures the current speed of the machine, with all other
    processes that run on it.
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
    **llama_kwargs: Any,
) -> dict[str, Any]:
    """Run a benchmark, and return its result, ready for JSON.

    Parameters
    ----------
    model : path, optional
        The GGUF; by default all-MiniLM-L6-v2.
    against : path, optional
        The other side, measured alternately: another GGUF, or the Python interpreter of an
        environment with another build of llamacrab.
    cases : sequence of str
        Names of the cases; by default all.
    rounds : int
        Number of runs per case.
    seconds : float
        Approximate duration of a run.
    report : callable
        Called with a line of text after every round.
    **llama_kwargs
        Keywords of `Llama`.

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
        # Do not resolve links: the python of a virtual environment is a link to one outside it.
        is_model = other.lower().endswith(".gguf")
        specs.append((other, sys.executable if is_model else other, other if is_model else model))
    sides: list[Side] = []
    try:
        for label, python, path in specs:
            sides.append(Side(label, python, path, seconds, **llama_kwargs))
        common = [name for name in sides[0].samples if name in sides[-1].samples]
        unknown = set(cases) - set(common)
        if unknown:
            raise InputError(f"no case {', '.join(sorted(unknown))}; there are {', '.join(common)}")
        chosen = [name for name in common if not cases or name in cases]
        for i in range(rounds + 1):
            for name in chosen:
                for side in sides if i % 2 else sides[::-1]:
                    side.measure(name)
            if not i:  # the first round warms up: page faults, buffers, caches, number of texts
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
    """Return for each case the rate of `new` divided by the rate of `old`.

    Without `old`, return the rate of the first side divided by that of the second side.

    Two sides of one run were measured alternately, and are compared round by round. An older result
    was measured at another time, when the machine may have been slower or faster. So the rates are
    compared twice, directly and relative to the speed of the machine at the time of each run, and
    the larger ratio is returned: a case is slower only if it is slower in both comparisons.

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
    """Return the cases that are certainly slower than `bound`, in every measurement.

    Noise of a busy machine may last for several rounds. So a slower case is measured twice more, by
    `again`, in new processes, and must be slower each time.
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
