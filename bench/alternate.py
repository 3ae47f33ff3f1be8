"""Compare two ways of doing the same work: A and B in turn, medians, the ratio of each round."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    name: str, n: int, runs: dict[str, Callable[[], float]], rounds: int, *, unit: str = "texts/s"
) -> None:
    """Run each of `runs` in turn, `rounds` times, and print rates and ratios over the last one.

    Parameters
    ----------
    name : str
        What is compared.
    n : int
        Units of work in a run.
    runs : dict of str to callable
        Each does the work once and returns the seconds that it took.
    rounds : int
        How often; the order turns round every time, so that none always comes first.
    """
    for run in runs.values():
        run()  # warm: page faults, buffers, caches
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for i in range(rounds):
        labels = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for label in labels:
            taken[label].append(runs[label]())
    base = list(runs)[-1]
    print(f"{name}: {n} a run, {rounds} rounds, in turn")
    for label, times in taken.items():
        ratios = sorted(b / a for a, b in zip(times, taken[base], strict=True))
        rate = n / statistics.median(times)
        print(
            f"  {label:40} {rate:10,.0f} {unit}   ratio {statistics.median(ratios):6.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
