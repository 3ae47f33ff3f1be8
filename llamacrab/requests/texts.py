"""Turn a collection of texts into a list, or raise an error that says what to pass instead.

Iterating is not enough: a data frame yields its column names, a dict its keys, a set its texts in
no order, and an Arrow array objects that are not str. No package is imported: a column is an object
with a method that turns it into a list, and a frame is an object with columns.
"""

from __future__ import annotations

from collections.abc import Mapping, MappingView, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Methods of Arrow; of pandas and polars; of numpy.
TO_LIST = ("to_pylist", "to_list", "tolist")
# Attributes of Arrow tables and Hugging Face datasets; of data frames.
COLUMN_NAMES = ("column_names", "columns")


def as_list(texts: Any, caller: str) -> list[Any]:
    """Return the texts of a call as a list. Its elements are checked when they are tokenized.

    Parameters
    ----------
    texts : iterable
        Texts, or sequences of token ids.
    caller : str
        The method that was called, for error messages.

    Raises
    ------
    InputError
        `texts` is one text, does not hold texts, or has no order.
    """
    if isinstance(texts, list):
        return texts
    _check(texts, caller)
    return _listed(texts, caller)


def as_iterator(texts: Any, caller: str) -> Iterator[Any]:
    """Return an iterator over a stream of texts; see `as_list`."""
    _check(texts, caller)
    if hasattr(texts, "to_pylist"):
        return (scalar.as_py() for scalar in texts)
    return iter(texts)


def as_pairs(pairs: Any, caller: str) -> list[Any]:
    """Return pairs of texts as a list; see `as_list`."""
    if isinstance(pairs, list):
        return pairs
    _check_kind(
        pairs,
        f"{caller} takes a list of pairs, not",
        of_mapping="list(d.items())",
        of_frame='zip(df["query"], df["document"])',
    )
    return _listed(pairs, caller)


def is_one(texts: Any, caller: str) -> bool:
    """Return True for one text or the token ids of one text, and False for several texts."""
    if isinstance(texts, str):
        return True
    if not isinstance(texts, list):
        _check(texts, caller)
    if not hasattr(texts, "__len__"):
        return False
    if not len(texts):
        return _kind(texts) in ("i", "u")
    first = next(iter(texts))
    return isinstance(first, (int, np.integer)) or getattr(first, "ndim", None) == 0


def _listed(texts: Any, caller: str) -> list[Any]:
    for name in TO_LIST:
        if callable(convert := getattr(texts, name, None)):
            try:
                return list(convert())
            except UnicodeDecodeError as error:
                raise InputError(f"{caller}: a text is not UTF-8: {error}") from None
    return list(texts)


def _check(texts: Any, caller: str) -> None:
    message = f"{caller} takes a list of texts, not"
    _check_kind(
        texts, message, of_mapping="list(d.values())", of_frame='one of its columns, df["column"]'
    )
    # Rows of an array may be the token ids of texts.
    if getattr(texts, "ndim", 1) != 1 and _kind(texts) not in ("i", "u", ""):
        instead = "one of its columns, array[:, 0]" if texts.ndim else "[array.item()]"
        raise InputError(f"{message} an array of shape {tuple(texts.shape)}: pass {instead}")


def _check_kind(data: Any, message: str, *, of_mapping: str, of_frame: str) -> None:
    """Raise for a collection that does not yield its texts in order."""
    kind = type(data).__name__
    if isinstance(data, str):
        raise InputError(f"{message} one str: pass [text]")
    if isinstance(data, (bytes, bytearray, memoryview)):
        raise InputError(f"{message} {kind}: pass [data.decode()]")
    if isinstance(data, Mapping):
        raise InputError(f"{message} a {kind}, which yields its keys: pass {of_mapping}")
    if kind == "LazyFrame":  # its columns are not known before it is computed
        raise InputError(f"{message} a {kind}: call its collect(), and pass {of_frame}")
    if (names := _column_names(data)) is not None:
        listed = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
        raise InputError(f"{message} a {kind} with the columns {listed}: pass {of_frame}")
    if isinstance(data, Set) and not isinstance(data, MappingView):
        raise InputError(f"{message} a {kind}, which has no order: pass sorted(s)")
    if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
        raise InputError(f"{message} {kind}")


def _kind(data: Any) -> str:
    """Return numpy's letter for the kind of an array's elements, or an empty str."""
    return str(getattr(getattr(data, "dtype", None), "kind", ""))


def _column_names(data: Any) -> list[Any] | None:
    if (names := getattr(getattr(data, "dtype", None), "names", None)) is not None:
        return list(names)  # a structured array
    for name in COLUMN_NAMES:
        # Look at the class: an instance may have attributes of any name.
        if hasattr(type(data), name):
            return list(getattr(data, name))
    return None
