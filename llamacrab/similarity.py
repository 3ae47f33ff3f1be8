"""Compare vectors, and find the nearest ones of a corpus."""

from __future__ import annotations

import numpy as np

# Rows handled at once: bounds the memory for what lies between, whatever the corpus.
BLOCK = 65_536


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
    """Return the cosine of every row of `a` (n, d) with every row of `b` (m, d): shape (n, m)."""
    cosines: np.ndarray = normalize(np.atleast_2d(a)) @ normalize(np.atleast_2d(b)).T
    return cosines


def semantic_search(
    query_vectors: np.ndarray, corpus_vectors: np.ndarray, top_k: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest rows of a corpus by cosine, best first.

    Parameters
    ----------
    query_vectors : ndarray, shape (n_queries, n_embd) or (n_embd,)
    corpus_vectors : ndarray, shape (n_corpus, n_embd)
        May be memory-mapped: it is read in blocks.
    top_k : int
        How many to return a query; fewer where the corpus is smaller.

    Returns
    -------
    scores : ndarray of float32, shape (n_queries, k)
    indices : ndarray of int64, shape (n_queries, k)
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    queries = np.atleast_2d(query_vectors).astype(np.float32)
    scores = np.empty((len(queries), 0), dtype=np.float32)
    indices = np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(corpus_vectors), BLOCK):
        block = cos_sim(queries, corpus_vectors[start : start + BLOCK])
        rows = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        scores = np.concatenate([scores, block], axis=1)
        indices = np.concatenate([indices, rows], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        scores = np.take_along_axis(scores, best, axis=1)
        indices = np.take_along_axis(indices, best, axis=1)
    return scores.astype(np.float32), indices
