"""Split texts that are too long into windows, and average the embeddings of the windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab.errors import EmptyInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamacrab._core import Tokenization


def bounds(n_tokens: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return where windows of `size` tokens begin and end.

    Each begins ``size - overlap`` tokens after the window before it. The last one ends with the
    text, and may overlap more: a short window would have too little context.
    """
    if n_tokens <= size:
        return [(0, n_tokens)]
    starts = range(0, n_tokens - size, size - overlap)
    return [(start, start + size) for start in starts] + [(n_tokens - size, n_tokens)]


class Windows:
    """The texts of one call as windows, and the mapping back to one row per text.

    Parameters
    ----------
    texts : sequence of str or of sequences of int
        The texts.
    tokenization : Tokenization
        Tokenizes a text without special tokens and without a limit.
    prefix_ids, suffix_ids : sequence of int
        Token ids around every window of a text; not put around token ids.
    size, overlap : int
        Tokens per window, without those around it, and tokens shared with the window before it.
    """

    def __init__(
        self,
        texts: Sequence[Any],
        tokenization: Tokenization,
        *,
        prefix_ids: Sequence[int],
        suffix_ids: Sequence[int],
        size: int,
        overlap: int,
    ) -> None:
        self.inputs: list[Any] = []
        # Set the dtype: numpy makes an empty list float64.
        before, after = np.array(prefix_ids, dtype=np.int32), np.array(suffix_ids, dtype=np.int32)
        firsts, weights = [], []
        for i, text in enumerate(texts):
            firsts.append(len(self.inputs))
            try:
                ids = tokenization.tokenize(text, i)
            except EmptyInputError:
                ids = np.empty(0, dtype=np.int32)
            parts = bounds(len(ids), size, overlap)
            weights += [max(1, stop - start) for start, stop in parts]
            if len(parts) == 1:
                self.inputs.append(text)
            elif isinstance(text, str):
                self.inputs += [np.concatenate([before, ids[a:b], after]) for a, b in parts]
            else:
                self.inputs += [ids[a:b] for a, b in parts]
        self._firsts = np.array(firsts, dtype=np.intp)
        self._weights = np.array(weights, dtype=np.float32)

    def pool(self, rows: np.ndarray) -> np.ndarray:
        """Return one row per text: the mean of its windows' rows, weighted by their tokens."""
        if not len(rows):
            return rows
        sums = np.add.reduceat(rows * self._weights[:, None], self._firsts, axis=0)
        means: np.ndarray = sums / np.add.reduceat(self._weights, self._firsts)[:, None]
        return means

    def done(self, done: np.ndarray) -> np.ndarray:
        """Return for each text whether all its windows were computed."""
        return np.logical_and.reduceat(done, self._firsts) if len(done) else done

    def text_of(self, window: int) -> int:
        """Return the number of the text that a window is part of."""
        return int(np.searchsorted(self._firsts, window, side="right") - 1)
