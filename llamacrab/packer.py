"""Put texts into packs: which texts one `llama_decode` computes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def pack(
    lengths: Sequence[int] | np.ndarray, *, n_tokens: int, n_seqs: int
) -> Iterator[np.ndarray]:
    """Yield packs of texts, longest texts first.

    A pack stays within both budgets, except that a text longer than `n_tokens` makes a pack of its
    own. Going down by length fills packs well, puts long texts alone, where they cost least (an
    encoder's attention grows with the square of the pack), and ends with the texts that are
    quickest to finish.

    Parameters
    ----------
    lengths : sequence of int, shape (n,)
        Tokens of each text, at least 1.
    n_tokens : int
        Tokens that a pack aims at.
    n_seqs : int
        Texts that a pack may hold.

    Yields
    ------
    ndarray of int
        Indices into `lengths`; every index comes exactly once.
    """
    if n_tokens < 1 or n_seqs < 1:
        raise ValueError(f"both budgets must be at least 1, not {n_tokens} and {n_seqs}")
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = room = 0
    for i, length in enumerate(lengths[order].tolist()):
        if i > start and (length > room or i - start == n_seqs):
            yield order[start:i]
            start = i
        if i == start:
            room = n_tokens
        room -= length
    if start < len(order):
        yield order[start:]
