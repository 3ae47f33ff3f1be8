"""Medians and percentiles of samples, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

DRAWS = 4000


@dataclass(frozen=True)
class Ratio:
    """A divided by B, with its 95 % interval."""

    value: float
    low: float
    high: float

    def is_below(self, bound: float) -> bool:
        """Whether the whole interval is below `bound`."""
        return self.high < bound


def paired(a: npt.ArrayLike, b: npt.ArrayLike) -> Ratio:
    """Return the ratio of rates that were measured alternately: the median of the rounds' ratios.

    The interval is a percentile bootstrap over rounds (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13).
    """
    logs = np.log(np.asarray(a, dtype=float) / np.asarray(b, dtype=float)).ravel()
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(logs, (DRAWS, len(logs))), axis=1)
    return _ratio(float(np.median(logs)), drawn)


def unpaired(a: npt.ArrayLike, b: npt.ArrayLike) -> Ratio:
    """Return the ratio of the medians of rates that were measured at different times."""
    rng = np.random.default_rng(0)
    value, drawn = 0.0, np.zeros(DRAWS)
    for sign, rates in ((1, a), (-1, b)):
        logs = np.log(np.asarray(rates, dtype=float)).ravel()
        value += sign * float(np.median(logs))
        drawn += sign * np.median(rng.choice(logs, (DRAWS, len(logs))), axis=1)
    return _ratio(value, drawn)


def _ratio(value: float, drawn: np.ndarray) -> Ratio:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ratio(*np.exp([value, low, high]).tolist())


def percentiles(seconds: npt.ArrayLike) -> dict[str, float]:
    """Return p50, p95 and p99 of latencies, in milliseconds."""
    found = np.percentile(np.asarray(seconds, dtype=float), [50, 95, 99]) * 1e3
    return dict(zip(("p50", "p95", "p99"), found.round(4).tolist(), strict=True))
