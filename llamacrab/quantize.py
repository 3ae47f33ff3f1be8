"""Embeddings in fewer bits, with the precisions of sentence-transformers.

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
    """Return the range of every dimension over typical embeddings, for int8 and uint8.

    Parameters
    ----------
    embeddings : array_like of float, shape (n, n_embd)
        Embeddings like those that will be quantized, a few hundred or more.

    Returns
    -------
    ndarray of float32, shape (2, n_embd)
        Smallest and largest value of each dimension.
    """
    array = np.asarray(embeddings, dtype=np.float32)
    if array.ndim != 2 or len(array) < 2 or not np.isfinite(array).all():
        raise InputError(f"calibrate takes two or more finite embeddings, not shape {array.shape}")
    return np.stack([array.min(axis=0), array.max(axis=0)])


def quantize(
    embeddings: npt.ArrayLike, dtype: str, *, ranges: npt.ArrayLike | None = None
) -> np.ndarray:
    """Return embeddings in another dtype.

    Parameters
    ----------
    embeddings : array_like of float, shape (..., n_embd)
        The embeddings.
    dtype : str
        - ``float32``, ``float16``: the same numbers in this type.
        - ``int8``, ``uint8``: the range of each dimension, divided into 255 steps; a value outside
          the range becomes the nearest end of it.
        - ``binary``, ``ubinary``: one bit per dimension, set if the value is positive. Eight bits
          per byte, the first in the highest bit; as int8 (the byte minus 128) or as uint8.
    ranges : array_like of float, shape (2, n_embd), optional
        The result of `calibrate`; needed for int8 and uint8. Embeddings can only be compared if
        they were quantized with the same ranges.

    Returns
    -------
    ndarray, shape (..., n_embd), or (..., n_embd / 8) for bits

    Raises
    ------
    InputError
        The dtype is unknown, ranges are missing or have another width, or n_embd is not a multiple
        of 8 (for bits).
    """
    array = np.asarray(embeddings)
    check(dtype, array.shape[-1], ranges)
    if dtype in ("float32", "float16"):
        return array.astype(dtype, copy=False)
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(array > 0, axis=-1)
        return bits if dtype == "ubinary" else (bits ^ 0x80).view(np.int8)
    low, high = np.asarray(ranges, dtype=np.float32)
    # A constant dimension carries no information: any step will do.
    steps = np.where(high > low, (high - low) / 255, 1)
    buckets = np.clip(np.floor((array - low) / steps), 0, 255)
    if dtype == "uint8":
        return cast("np.ndarray", buckets.astype(np.uint8))
    return cast("np.ndarray", (buckets - 128).astype(np.int8))


def check(dtype: str, n_embd: int, ranges: npt.ArrayLike | None) -> None:
    """Raise if `quantize` cannot convert embeddings of `n_embd` numbers."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype in ("binary", "ubinary") and n_embd % 8:
        raise InputError(f"{dtype} packs 8 dimensions per byte: {n_embd} is not a multiple of 8")
    if dtype in ("int8", "uint8"):
        if ranges is None:
            raise InputError(
                f"{dtype} needs ranges=, which llamacrab.quantize.calibrate makes from typical "
                "embeddings: with ranges of their own, the embeddings of two calls could not be "
                "compared"
            )
        if np.shape(ranges) != (2, n_embd):
            raise InputError(f"ranges must be of shape (2, {n_embd}), not {np.shape(ranges)}")
