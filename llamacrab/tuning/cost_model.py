"""The cost of a pack of n tokens, modelled as ``a + b n + c n**2`` seconds.

A fixed part, the matrix products, and an encoder's attention, which spans the whole pack. Seconds
per token are least at ``n = sqrt(a / c)``.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def fit(packs: np.ndarray) -> tuple[float, float, float]:
    """Fit ``seconds = a + b n + c n**2`` to packs, each weighted by its own size.

    Parameters
    ----------
    packs : structured array
        Fields ``n_tokens`` and ``seconds``, of at least three different sizes.

    Returns
    -------
    a, b, c : float
        None is negative.
    """
    n = packs["n_tokens"].astype(float)
    seconds = packs["seconds"]
    # Seconds per token are what matters, and medians keep out packs that something else held up.
    sizes = np.unique(n)
    if len(sizes) > 64:
        edges = np.quantile(n, np.linspace(0, 1, 33))
        groups = [(n >= low) & (n <= high) for low, high in itertools.pairwise(edges)]
    else:
        groups = [n == size for size in sizes]
    x = np.array([np.median(n[group]) for group in groups if group.any()])
    y = np.array([np.median(seconds[group] / n[group]) for group in groups if group.any()])
    terms = np.stack([1 / x, np.ones_like(x), x], axis=1)
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(terms[:, kept], y, rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        del kept[int(np.argmin(found))]
    model = np.zeros(3)
    model[kept] = np.maximum(found, 0)
    return float(model[0]), float(model[1]), float(model[2])


def best_pack(a: float, b: float, c: float, *, least: int = 32, most: int) -> int:
    """Return the pack, in tokens, at which ``a / n + b + c n`` is least.

    Parameters
    ----------
    a, b, c : float
        What `fit` found.
    least, most : int
        The smallest and the largest pack that were measured: the model knows nothing beyond them.
    """
    if c <= 0:
        return most
    return int(min(most, max(least, 8 * round(math.sqrt(a / c) / 8))))


def spread_of(packs: np.ndarray) -> float:
    """Return how far apart packs of one size are: 0.1 means that most are within a tenth.

    It is the interquartile range of seconds per token over their median, and of all sizes the
    median. On a machine that does nothing else it is small. Infinite where there are too few packs.

    Parameters
    ----------
    packs : structured array
        Fields ``n_tokens`` and ``seconds``.
    """
    n = packs["n_tokens"].astype(float)
    per_token = packs["seconds"] / np.maximum(n, 1)
    # Sizes that differ by less than a quarter of an octave are alike.
    groups = np.round(np.log2(np.maximum(n, 1)) * 4)
    found = []
    for group in np.unique(groups):
        low, middle, high = np.quantile(per_token[groups == group], [0.25, 0.5, 0.75])
        if (groups == group).sum() >= 4 and middle > 0:
            found.append((high - low) / middle)
    return float(np.median(found)) if found else math.inf
