"""Vectors in fewer bits, with the meanings that sentence-transformers gives to its precisions.

The formulas are those of ``sentence_transformers.quantization.quantize_embeddings``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from llamacrab.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

DTYPES = ("float32", "float16", "int8", "uint8", "binary", "ubinary")


def calibrate(embeddings: npt.ArrayLike) -> np.ndarray:
    """Return the range of every dimension over typical vectors, for int8 and uint8.

    Parameters
    ----------
    embeddings : array_like of float, shape (n, n_embd)
        Vectors like those that will be quantized, a few hundred or more.

    Returns
    -------
    ndarray of float32, shape (2, n_embd)
        Least and greatest value of each dimension.
    """
    array = np.asarray(embeddings, dtype=np.float32)
    if array.ndim != 2 or len(array) < 2 or not np.isfinite(array).all():
        raise InputError(f"calibrate takes two or more finite vectors, not shape {array.shape}")
    return np.stack([array.min(axis=0), array.max(axis=0)])


def quantize(
    embeddings: npt.ArrayLike, dtype: str, *, ranges: npt.ArrayLike | None = None
) -> np.ndarray:
    """Return vectors in another dtype.

    Parameters
    ----------
    embeddings : array_like of float, shape (..., n_embd)
        The vectors.
    dtype : str
        - ``float32``, ``float16``: the numbers as they are.
        - ``int8``, ``uint8``: each dimension's range, cut into 255 steps; a value out of range
          becomes its nearest end.
        - ``binary``, ``ubinary``: one bit a dimension, set where the value is positive, eight a
          byte, the first in the highest bit; as int8, which is the byte less 128, or as uint8.
    ranges : array_like of float, shape (2, n_embd), optional
        What `calibrate` returned; needed for int8 and uint8. Vectors can only be compared with
        others that were quantized with the same ranges.

    Returns
    -------
    ndarray, shape (..., n_embd), or (..., n_embd / 8) of bits

    Raises
    ------
    InputError
        The dtype is unknown, ranges are missing or of another width, or n_embd is no multiple of 8.
    """
    array = np.asarray(embeddings)
    check(dtype, array.shape[-1], ranges)
    if dtype in ("float32", "float16"):
        return array.astype(dtype, copy=False)
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(array > 0, axis=-1)
        return bits if dtype == "ubinary" else (bits ^ 0x80).view(np.int8)
    low, high = np.asarray(ranges, dtype=np.float32)
    # A dimension that never varied carries nothing; any step will do.
    steps = np.where(high > low, (high - low) / 255, 1)
    buckets = np.clip(np.floor((array - low) / steps), 0, 255)
    if dtype == "uint8":
        return cast("np.ndarray", buckets.astype(np.uint8))
    return cast("np.ndarray", (buckets - 128).astype(np.int8))


def check(dtype: str, n_embd: int, ranges: npt.ArrayLike | None) -> None:
    """Refuse what `quantize` cannot do to vectors of `n_embd` numbers."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype in ("binary", "ubinary") and n_embd % 8:
        raise InputError(f"{dtype} packs eight dimensions a byte: {n_embd} is no multiple of 8")
    if dtype in ("int8", "uint8"):
        if ranges is None:
            raise InputError(
                f"{dtype} needs ranges=, which llamacrab.quantize.calibrate makes from typical "
                "vectors: ranges of each call's own would make its vectors comparable to no others"
            )
        if np.shape(ranges) != (2, n_embd):
            raise InputError(f"ranges must be of shape (2, {n_embd}), not {np.shape(ranges)}")
