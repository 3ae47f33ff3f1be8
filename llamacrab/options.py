"""`EmbedOptions`: how texts become embeddings. Checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import numpy as np

from llamacrab.errors import InputError

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy.typing as npt

    Truncate: TypeAlias = bool | Literal["end", "start", "middle"]


class Norm(NamedTuple):
    """What embeddings are divided by."""

    #: ``"none"``: nothing; ``"p"``: the p-norm; ``"max"``: the largest absolute value;
    #: ``"int16"``: that value, scaled to 32760. `norm_kind` in native/job.hpp has the same names.
    kind: str
    p: float = 2.0


NORMS = {"none": Norm("none"), "l1": Norm("p", 1), "l2": Norm("p", 2), "max": Norm("max")}


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
    """How texts become embeddings. A keyword of the call overrides the field of that name.

    Parameters
    ----------
    normalize : bool, str or int
        Divide each embedding by its norm: True or ``"l2"`` (Euclidean length), ``"l1"`` (sum of
        absolute values), ``"max"`` (largest absolute value), False or ``"none"`` (no norm). An int
        has the meaning of llama.cpp's ``embd_normalize``: -1 none, 0 largest absolute value scaled
        to 32760, 1 l1, 2 l2, p > 2 the p-norm.
    start_token : bool or int
        True: begin with the token that the model was trained to see first (BOS or CLS), if it has
        one. False: with no special token. An int: with this token id.
    end_token : bool or int
        The same for the token that the model was trained to see last (EOS or SEP).
    truncate : bool or {"end", "start", "middle"}
        Which part to cut away from a text that is too long, instead of raising; True is the end.
        "middle" keeps the first and the last tokens, each half of what fits. Special tokens and
        the prompt are never cut; they count towards the limit.
    parse_special : bool
        Treat the spelling of a special token in a text, such as ``[SEP]``, as that token.
    prompt : str, optional
        Put before every text; never cut.
    prompt_name : str, optional
        Name of one of the model's own prompts, such as ``"query"``, to put before every text; see
        `Llama.prompts`.
    dimensions : int, optional
        Keep only the first `dimensions` numbers of an embedding, and normalize them. Good only for
        models that were trained for it (Matryoshka).
    dtype : str
        ``float32``, ``float16``, ``int8``, ``uint8``, ``binary`` or ``ubinary``; see
        `llamacrab.quantize.quantize`.
    ranges : array_like, shape (2, n), optional
        For int8 and uint8: the result of `llamacrab.quantize.calibrate`.
    chunk : bool or int
        Split a text of more tokens than this (True: than fit) into windows of this size, embed
        each window, and return the mean of their embeddings, weighted by their tokens.
    chunk_overlap : int
        Tokens that a window shares with the window before it.
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
        """Key of these options in a cache. 1 and True differ in it; `ranges` are not part of it."""
        return repr(self)

    @property
    def norm(self) -> Norm:
        """The norm to divide embeddings by."""
        value = self.normalize
        if isinstance(value, (bool, np.bool_)):
            return NORMS["l2" if value else "none"]
        if isinstance(value, str):
            if value in NORMS:
                return NORMS[value]
        elif isinstance(value, (int, np.integer)) and value >= -1:
            numbers = {-1: Norm("none"), 0: Norm("int16")}
            return numbers.get(int(value)) or Norm("p", float(value))
        raise InputError(
            "normalize must be a bool, one of "
            + ", ".join(NORMS)
            + f", or llama.cpp's embd_normalize (-1 or more), not {value!r}"
        )


DEFAULT = EmbedOptions()


def merge(options: EmbedOptions | None, changes: Any) -> EmbedOptions:
    """Return options with the fields replaced that a call gives and that are not None."""
    changed = {name: value for name, value in changes.items() if value is not None}
    options = options or DEFAULT
    return replace(options, **changed) if changed else options
