"""`EmbedOptions`: how texts become vectors, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from llamacrab.errors import InputError

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy.typing as npt

    Truncate: TypeAlias = bool | Literal["end", "start", "middle"]


# The p of a p-norm, or what stands for another scale; native/scheduler.hpp has the same numbers.
NORMS = {"none": 0.0, "l1": 1.0, "l2": 2.0, "max": float("inf")}
NORM_INT16 = -16.0


class EmbedKeywords(TypedDict, total=False):
    """The fields of `EmbedOptions`, as keywords of a call."""

    normalize: bool | str | int
    start_token: bool | int
    end_token: bool | int
    truncate: Truncate
    parse_special: bool
    prompt: str | None
    prompt_name: str | None
    dimensions: int | None
    dtype: str
    ranges: npt.ArrayLike | None
    chunk: bool | int
    chunk_overlap: int


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How texts become vectors. A keyword given to the call itself wins over the options.

    Parameters
    ----------
    normalize : bool, str or int
        Divide each vector by its norm: True or ``"l2"`` (Euclid), ``"l1"`` (sum of absolute
        values), ``"max"`` (greatest absolute value), False or ``"none"`` (not at all). A number
        that is no bool is taken as llama.cpp's ``embd_normalize``: -1 none, 0 greatest absolute
        value scaled to 32760, 1 l1, 2 l2, p > 2 the p-norm.
    start_token : bool or int
        Begin with the token that the model was trained to see first (BOS or CLS), if it has one;
        with nothing; or with this token id.
    end_token : bool or int
        End with the token that the model was trained to see last (EOS or SEP), likewise.
    truncate : bool or {"end", "start", "middle"}
        Which part of a text that is too long to cut away, instead of raising; True is the end.
        "middle" keeps the first half of what fits and the last. The special tokens around a text,
        and the prompt, stay, and count.
    parse_special : bool
        Read the spelling of a special token, such as ``[SEP]``, in a text as that token.
    prompt : str, optional
        Put this before every text. Never cut.
    prompt_name : str, optional
        Put the model's own prompt of this name, such as ``"query"``, before every text; see
        `Llama.prompts`.
    dimensions : int, optional
        Keep only the first so many numbers of a vector, before it is normalized. Only models that
        were trained for it (Matryoshka) give good vectors so.
    dtype : str
        ``float32``, ``float16``, ``int8``, ``uint8``, ``binary`` or ``ubinary``; see
        `llamacrab.quantize.quantize`.
    ranges : array_like, shape (2, n), optional
        For int8 and uint8: what `llamacrab.quantize.calibrate` returned.
    chunk : bool or int
        Split a text of more tokens than this (True: than fit) into windows of so many, embed each,
        and return their mean, weighted by their tokens.
    chunk_overlap : int
        Tokens that a window shares with the one before it.
    """

    normalize: bool | str | int = True
    start_token: bool | int = True
    end_token: bool | int = True
    truncate: Truncate = False
    parse_special: bool = False
    prompt: str | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    dtype: str = "float32"
    ranges: npt.ArrayLike | None = field(default=None, compare=False, repr=False)
    chunk: bool | int = False
    chunk_overlap: int = 0

    @cached_property
    def key(self) -> str:
        """What tells these options from others: 1 from True, and ranges not at all."""
        return repr(self)

    @property
    def norm(self) -> float:
        """The norm that vectors are divided by, as a number of `NORMS` or `NORM_INT16`."""
        value = self.normalize
        if isinstance(value, (bool, np.bool_)):
            return 2.0 if value else 0.0
        if isinstance(value, str):
            if value in NORMS:
                return NORMS[value]
        elif isinstance(value, (int, np.integer)) and value >= -1:
            return {-1: 0.0, 0: NORM_INT16}.get(int(value), float(value))
        raise InputError(
            "normalize must be a bool, one of "
            + ", ".join(NORMS)
            + f", or llama.cpp's embd_normalize (-1 or more), not {value!r}"
        )


DEFAULT = EmbedOptions()


def merge(options: EmbedOptions | None, changes: Any) -> EmbedOptions:
    """Return options with those keywords of a call changed that are not None."""
    changed = {name: value for name, value in changes.items() if value is not None}
    options = options or DEFAULT
    return replace(options, **changed) if changed else options
