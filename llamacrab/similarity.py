"""Compare embeddings, and find the nearest embeddings of a corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from llamacrab.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TypeAlias

    Score: TypeAlias = Literal["cosine", "dot", "euclidean"]

# Rows normalized at once: bounds the memory for intermediate results.
BLOCK = 65_536
# How far from 1 the length of a normalized row may be. float16 stays within it; a row that was cut
# after it was normalized does not.
TOLERANCE = 1e-2


def normalize(vectors: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return `vectors` with every row divided by its L2 norm; rows of zeros stay zero.

    Parameters
    ----------
    vectors : ndarray, shape (n, n_embd) or (n_embd,)
    out : ndarray, optional
        Where to put the result, of the same shape; may be `vectors` itself.

    Returns
    -------
    ndarray
        `out`, or a new array of float32 or float64, whichever holds `vectors`.
    """
    # Integers and half precision would overflow in the squares, or could not hold the result.
    kind = np.result_type(vectors.dtype, np.float32)
    result = np.empty(vectors.shape, dtype=kind) if out is None else out
    rows, into = np.atleast_2d(vectors), np.atleast_2d(result)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].astype(kind, copy=False)
        norms = np.sqrt(np.einsum("ij,ij->i", block, block))[:, None]
        np.divide(block, np.where(norms == 0, 1, norms), out=into[start : start + BLOCK])
    return result


def cos_sim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of every row of `a` (n, d) with every row of `b` (m, d): shape (n, m).

    Raises
    ------
    InputError
        Wrong shapes, NaN or infinity, or a row of zeros, which has no direction.
    """
    return _scores("cosine", *_both("cosine", a, b))


def dot_score(a: np.ndarray, b: np.ndarray, *, normalized: bool = True) -> np.ndarray:
    """Return the dot product of every row of `a` (n, d) with every row of `b` (m, d): (n, m).

    Parameters
    ----------
    a, b : ndarray
        The embeddings.
    normalized : bool
        Check that every row has length 1: a dot product favours long rows. False: take rows of any
        length, for a model that was trained for dot products.

    Raises
    ------
    InputError
        Wrong shapes, NaN or infinity, or a row whose length is not 1.
    """
    return _scores("dot", *_both("dot", a, b, normalized))


def euclidean_sim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return minus the distance of every row of `a` (n, d) from every row of `b` (m, d): (n, m).

    Raises
    ------
    InputError
        Wrong shapes, NaN or infinity.
    """
    return _scores("euclidean", *_both("euclidean", a, b))


def pairwise_cos_sim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `a` (n, d) with the same row of `b` (n, d): shape (n,)."""
    a, b = _both("cosine", a, b, pairwise=True)
    return cast("np.ndarray", np.einsum("ij,ij->i", a, b))


def pairwise_dot_score(a: np.ndarray, b: np.ndarray, *, normalized: bool = True) -> np.ndarray:
    """Return the dot product of each row of `a` with the same row of `b`; see `dot_score`."""
    a, b = _both("dot", a, b, normalized, pairwise=True)
    return cast("np.ndarray", np.einsum("ij,ij->i", a, b))


def pairwise_euclidean_sim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return minus the distance of each row of `a` from the same row of `b`: shape (n,)."""
    a, b = _both("euclidean", a, b, pairwise=True)
    return cast("np.ndarray", -np.linalg.norm(a - b, axis=1)).astype(np.float32)


def semantic_search(
    query_embeddings: np.ndarray,
    corpus_embeddings: np.ndarray | Iterable[np.ndarray],
    *,
    top_k: int = 10,
    score: Score = "cosine",
    normalized: bool = True,
    query_block: int = 256,
    corpus_block: int = 16_384,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a corpus that are nearest to each query, best first.

    The search is exact: every query is compared with every row, a block of queries with a block of
    rows at a time. The memory used depends on the blocks and the result, not on the corpus.

    Parameters
    ----------
    query_embeddings : ndarray, shape (n_queries, n_embd) or (n_embd,)
        Numbers of any type. They are compared in float32, distances in float64.
    corpus_embeddings : ndarray, shape (n_corpus, n_embd), or an iterable of such arrays
        May be memory-mapped, or an iterable of blocks such as `Llama.embed_iter`.
    top_k : int
        Rows to return per query; fewer if the corpus is smaller.
    score : {"cosine", "dot", "euclidean"}
        See `cos_sim`, `dot_score` and `euclidean_sim`.
    normalized : bool
        Check that rows compared by ``"dot"`` have length 1; see `dot_score`.
    query_block, corpus_block : int
        Queries and rows compared at once.

    Returns
    -------
    scores : ndarray of float32, shape (n_queries, k)
    indices : ndarray of int64, shape (n_queries, k)
        Rows of the corpus. Rows with equal scores are in the order of the corpus.

    Raises
    ------
    InputError
        Wrong shapes, NaN or infinity, or rows that `score` cannot compare; the message names the
        row.
    """
    _check_counts(top_k=top_k, query_block=query_block, corpus_block=corpus_block)
    if score not in ("cosine", "dot", "euclidean"):
        raise InputError(f"score must be 'cosine', 'dot' or 'euclidean', not {score!r}")
    queries = _rows(query_embeddings, "the queries", score, normalized)
    best = [_Best(top_k) for _ in queries]
    for first, block in _blocks(corpus_embeddings, corpus_block):
        rows = _rows(block, "the corpus", score, normalized, first)
        for start in range(0, len(queries), query_block):
            found = _scores(score, queries[start : start + query_block], rows)
            for of_query, values in zip(best[start : start + query_block], found, strict=True):
                of_query.add(values, first)
    return _stacked(best, top_k)


def semantic_search_binary(
    query_embeddings: np.ndarray,
    corpus_bits: np.ndarray | Iterable[np.ndarray],
    *,
    top_k: int = 10,
    rescore: bool = True,
    rescore_multiplier: int = 4,
    corpus_block: int = 16_384,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a binary corpus that are nearest to each query, best first.

    Rows are found by the number of bits that differ from those of the query. The best
    ``top_k * rescore_multiplier`` rows are then sorted by the dot product of the query's numbers
    with the row's bits, as in sentence-transformers.

    Parameters
    ----------
    query_embeddings : ndarray of floats, shape (n_queries, n_embd) or (n_embd,)
        The queries, not packed.
    corpus_bits : ndarray of uint8 or int8, shape (n_corpus, ceil(n_embd / 8)), or an iterable
        Signs, packed: ``np.packbits(vectors > 0, axis=1)`` (ubinary), or the same minus 128 as int8
        (binary).
    top_k, corpus_block
        As for `semantic_search`.
    rescore : bool
        Sort by the dot products; False: only by the bits.
    rescore_multiplier : int
        Rows to sort by the dot product, per row that is returned.

    Returns
    -------
    scores : ndarray of float32, shape (n_queries, k)
        Dot products; without `rescore`, minus the number of bits that differ.
    indices : ndarray of int64, shape (n_queries, k)

    Raises
    ------
    InputError
        Wrong shapes or types, or NaN or infinity.
    """
    _check_counts(top_k=top_k, rescore_multiplier=rescore_multiplier, corpus_block=corpus_block)
    queries = _rows(query_embeddings, "the queries", "dot", normalized=False)
    packed = np.packbits(queries > 0, axis=1)
    best = [_Best(top_k * rescore_multiplier if rescore else top_k, keep=rescore) for _ in queries]
    for first, block in _blocks(corpus_bits, corpus_block):
        rows = _bits(block, packed.shape[1], queries.shape[1])
        for of_query, bits in zip(best, packed, strict=True):
            of_query.add(-_popcount(rows ^ bits).astype(np.float32), first, rows)
    if rescore:
        for of_query, query in zip(best, queries, strict=True):
            of_query.rescore(query, top_k)
    return _stacked(best, top_k)


class _Best:
    """The best rows for one query so far; of equal scores, the earlier rows."""

    def __init__(self, top_k: int, *, keep: bool = False) -> None:
        self.top_k = top_k
        self.scores = np.empty(0, dtype=np.float32)
        self.indices = np.empty(0, dtype=np.int64)
        self.rows: np.ndarray | None = None  # their bits, for a binary search that sorts them again
        self._keep = keep

    def add(self, scores: np.ndarray, first: int, rows: np.ndarray | None = None) -> None:
        """Add the scores of the next rows, which begin with row `first`."""
        new = np.arange(len(scores))
        if len(self.scores) == self.top_k:
            # This drops most rows of most blocks. A later row with an equal score is worse.
            new = np.flatnonzero(scores > self.scores[-1])
            if not len(new):
                return
        if len(new) > self.top_k:
            worst = np.partition(scores[new], -self.top_k)[-self.top_k]
            new = new[scores[new] >= worst]
        all_scores = np.concatenate([self.scores, scores[new]])
        order = np.argsort(-all_scores, kind="stable")[: self.top_k]
        self.scores = all_scores[order].astype(np.float32)
        self.indices = np.concatenate([self.indices, new + first])[order]
        if self._keep and rows is not None:
            old = rows[:0] if self.rows is None else self.rows
            self.rows = np.concatenate([old, rows[new]])[order]

    def rescore(self, query: np.ndarray, top_k: int) -> None:
        """Sort by the dot product of the query with the bits of the rows, and keep the best."""
        if self.rows is None:
            return
        bits = np.unpackbits(self.rows, axis=1, count=len(query))
        scores = bits.astype(np.float32) @ query.astype(np.float32)
        order = np.lexsort((self.indices, -scores))[:top_k]
        self.scores, self.indices = scores[order], self.indices[order]


def _stacked(best: list[_Best], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    if not best:
        return np.empty((0, top_k), dtype=np.float32), np.empty((0, top_k), dtype=np.int64)
    return np.stack([one.scores for one in best]), np.stack([one.indices for one in best])


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, not {value!r}")


def _blocks(corpus: Any, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a corpus in blocks of at most `size` rows, each with the number of its first row."""
    if isinstance(corpus, (list, tuple)) and corpus and getattr(corpus[0], "ndim", 1) != 2:
        corpus = _matrix(corpus, "the corpus")
    first = 0
    for part in [corpus] if hasattr(corpus, "shape") else corpus:
        if np.ndim(part) != 2:
            raise InputError(f"the corpus must have shape (n_corpus, n_embd), not {np.shape(part)}")
        for start in range(0, len(part), size):
            yield first + start, part[start : start + size]
        first += len(part)


def _matrix(vectors: Any, name: str) -> np.ndarray:
    """Return `vectors` as numbers of shape (n, d)."""
    try:
        array = np.atleast_2d(np.asarray(vectors))
    except ValueError as error:
        raise InputError(f"{name} must be a matrix of numbers: {error}") from None
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name} must be a matrix of numbers, not of {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"{name} must have shape (n, d) or (d,), not {np.shape(vectors)}")
    return array


def _rows(
    vectors: Any, name: str, score: Score, normalized: bool = True, first: int = 0
) -> np.ndarray:
    """Check vectors, and return them ready for `_scores`.

    They are float32, and of length 1 for cosines. For distances they are float64, as distances are
    small differences of large squares.
    """
    kind = np.float64 if score == "euclidean" else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.ascontiguousarray(_matrix(vectors, name), dtype=kind)
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        odd = ~((lengths > 1e-15) & (lengths < 1e15))
        if odd.any():  # their squares may not fit in float32
            lengths[odd] = np.linalg.norm(rows[odd].astype(np.float64), axis=1)

    def refuse(wrong: np.ndarray, complaint: str) -> None:
        if wrong.any():
            i = int(wrong.argmax())
            raise InputError(f"row {first + i} of {name} {complaint.format(lengths[i])}")

    refuse(~np.isfinite(lengths), "holds NaN, infinity, or numbers too large to compare")
    if score == "cosine":
        refuse(lengths == 0, "is all zeros: it has no direction")
        if (np.abs(lengths - 1) > 1e-6).any():
            rows = rows / lengths[:, None]
    elif score == "dot" and normalized:
        refuse(
            np.abs(lengths - 1) > TOLERANCE,
            "has length {:.4g}, and dot products favour long rows: normalize() them or compare by "
            "cosine, or pass normalized=False if the model was trained for dot products",
        )
    return rows


def _both(
    score: Score, a: Any, b: Any, normalized: bool = True, *, pairwise: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    rows = _rows(a, "a", score, normalized), _rows(b, "b", score, normalized)
    if pairwise and len(rows[0]) != len(rows[1]):
        raise InputError(f"a has {len(rows[0])} rows, b has {len(rows[1])}")
    _check_width(*rows)
    return rows


def _check_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"vectors of {a.shape[1]} and of {b.shape[1]} values cannot be compared: they must "
            "come from one model, with the same number of dimensions"
        )


def _scores(score: Score, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the scores of all pairs of rows: float32, shape (n, m)."""
    _check_width(a, b)
    scores: np.ndarray = a @ b.T
    if score == "euclidean":  # |a - b|^2 = |a|^2 + |b|^2 - 2ab, in place
        scores *= -2
        scores += np.einsum("ij,ij->i", a, a)[:, None]
        scores += np.einsum("ij,ij->i", b, b)
        np.sqrt(np.maximum(scores, 0, out=scores), out=scores)
        scores = -scores.astype(np.float32)
    return scores


def _bits(block: Any, n_bytes: int, n_embd: int) -> np.ndarray:
    """Check packed rows, and return them as uint8."""
    rows = np.ascontiguousarray(block)
    if rows.dtype == np.int8:
        rows = rows.view(np.uint8) ^ np.uint8(128)
    if rows.dtype != np.uint8 or rows.shape[1] != n_bytes:
        raise InputError(
            f"a binary corpus for queries of {n_embd} values has rows of {n_bytes} bytes (uint8 or "
            f"int8), not of {rows.shape[1]} {rows.dtype}"
        )
    return rows


_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, np.uint8)


def _popcount(rows: np.ndarray) -> np.ndarray:
    """Return how many bits of each row are set: int64, shape (n,)."""
    if not hasattr(np, "bitwise_count"):  # numpy before 2.0
        return cast("np.ndarray", _BITS_OF_BYTE[rows].sum(axis=1, dtype=np.int64))
    words = rows.view(np.uint64) if rows.shape[1] % 8 == 0 else rows
    return cast("np.ndarray", np.bitwise_count(words).sum(axis=1, dtype=np.int64))
