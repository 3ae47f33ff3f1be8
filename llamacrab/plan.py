"""What is done to the texts of a call before they are computed, and to their rows afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab import quantize
from llamacrab._core import Encoder, Model, PoolingType
from llamacrab.chunking import Windows
from llamacrab.errors import InputError, LlamaError
from llamacrab.offsets import kept, token_offsets
from llamacrab.options import NORM_INT16, EmbedOptions
from llamacrab.prompts import ids_of, split_at_special

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# More tokens than any text has.
NO_LIMIT = 2**31 - 1


@dataclass
class Prepared:
    """The texts of one call, ready for the scheduler."""

    plan: Plan
    units: list[Any]
    windows: Windows | None = None

    def finish(self, rows: Any) -> Any:
        """Return what the call returns, from what the scheduler computed."""
        how = self.plan.how
        if how.dtype == "float32" and self.windows is None:
            return rows
        if not self.plan.pooled:
            return [quantize.quantize(row, how.dtype, ranges=how.ranges) for row in rows]
        if self.windows is not None:
            rows = normalized(self.windows.pool(rows), how.norm)
        return quantize.quantize(rows, how.dtype, ranges=how.ranges)

    def finish_one(self, rows: Any) -> Any:
        """Return the same of a call for a single text."""
        return self.finish(rows)[0]

    def restate(self, error: LlamaError) -> None:
        """Have an error speak of texts, and hold their rows, where it speaks of windows."""
        if error.rows is not None:
            error.rows = self.finish(error.rows)
        if self.windows is None:
            return
        if error.done is not None:
            error.done = self.windows.done(error.done)
        if error.index is not None:
            error.index = self.windows.text_of(error.index)
            error.args = (f"{error} (a window of text {error.index})",)


class Plan:
    """How the texts of calls with the same options are computed.

    Parameters
    ----------
    how : EmbedOptions
        What was asked for; all of it is checked here.
    model : Model
        The model.
    pooling_type : PoolingType
        How it pools.
    limit : int
        Tokens that fit.
    prompts : mapping of str to str
        The model's own, by name.
    larger : str
        How to make `limit` larger, for error messages.

    Attributes
    ----------
    encoder : Encoder
        Makes texts into ids.
    norm, width : float, int
        What the scheduler is to do to rows.
    """

    def __init__(
        self,
        how: EmbedOptions,
        model: Model,
        pooling_type: PoolingType,
        limit: int,
        prompts: Mapping[str, str],
        larger: str = "",
    ) -> None:
        self.how = how
        self.pooled = pooling_type != PoolingType.NONE
        self.width = _width(how, model)
        # Windows are averaged as they come, and their mean is normalized.
        self.norm = 0.0 if how.chunk else how.norm
        vocab = model.vocab
        prompt = _prompt(how, prompts)
        self._lead = ""
        prefix = _special("start_token", how.start_token, vocab.prefix, len(vocab))
        suffix = _special("end_token", how.end_token, vocab.suffix, len(vocab))
        if prompt:
            # The text that touches a text is split into tokens together with it.
            *before, lead = split_at_special(vocab, prompt)
            prefix, self._lead = (*prefix, *ids_of(vocab, before)), str(lead)
        self._n_around = (len(prefix), len(suffix))
        around: dict[str, Any] = {
            "prefix": prefix,
            "suffix": suffix,
            "lead": self._lead,
            "parse_special": how.parse_special,
        }
        self.encoder = Encoder(
            vocab,
            limit=limit,
            truncate=how.truncate,
            text_only=bool(prompt) and not how.chunk,
            advice="pass truncate=True to cut it"
            + (", or chunk=True to average over windows of it" if self.pooled else ""),
            larger=larger,
            **around,
        )
        self._uncut = Encoder(vocab, limit=NO_LIMIT, **around)
        self._chunking: dict[str, Any] | None = None
        if how.chunk:
            if not self.pooled:
                raise InputError("chunk= needs a pooling: without one there is no row to average")
            head = [*prefix, *(ids_of(vocab, [self._lead]) if prompt else ())]
            self._chunking = {
                "head": head,
                "tail": suffix,
                "size": _window(how, limit, len(head) + len(suffix)),
                "overlap": how.chunk_overlap,
                "encoder": Encoder(
                    vocab,
                    limit=NO_LIMIT,
                    parse_special=how.parse_special,
                    prefix=(),
                    suffix=(),
                    text_only=bool(prompt),
                ),
            }

    def offsets(self, text: Any, ids: np.ndarray) -> np.ndarray:
        """Return where in a text its tokens come from, shape (n, 2); see `token_offsets`."""
        if not isinstance(text, str):
            return np.zeros((len(ids), 2), dtype=np.int32)
        full = self._uncut.encode(text)
        spans = token_offsets(
            self._uncut.vocab,
            self._lead + text,
            full,
            n_prefix=self._n_around[0],
            n_suffix=self._n_around[1],
        )
        places: np.ndarray = np.maximum(spans[kept(full, ids)] - len(self._lead), 0)
        return places

    def prepare(self, texts: list[Any]) -> Prepared:
        """Return the texts of one call as the scheduler takes them."""
        if self._chunking is None:
            return Prepared(self, texts)
        windows = Windows(texts, **self._chunking)
        return Prepared(self, windows.units, windows)


def normalized(rows: np.ndarray, norm: float) -> np.ndarray:
    """Divide each row by its norm, as native/scheduler.cpp does."""
    if norm == 0:
        return rows
    order = np.inf if norm == NORM_INT16 else norm
    lengths = np.linalg.norm(rows.astype(np.float64), ord=order, axis=-1, keepdims=True)
    lengths[lengths == 0] = 1  # of a text that failed before it had a row
    scaled: np.ndarray = rows / (lengths / 32760 if norm == NORM_INT16 else lengths)
    return scaled.astype(np.float32)


def _special(name: str, given: bool | int, own: Sequence[int], n_tokens: int) -> tuple[int, ...]:
    """Return the tokens to put at one end, where the model's own are `own`."""
    if isinstance(given, (bool, np.bool_)):
        return tuple(own) if given else ()
    if not isinstance(given, (int, np.integer)) or not 0 <= given < n_tokens:
        raise InputError(f"{name} must be a bool or an id in range({n_tokens}), not {given!r}")
    return (int(given),)


def _prompt(how: EmbedOptions, prompts: Mapping[str, str]) -> str:
    if how.prompt_name is None:
        return how.prompt or ""
    if how.prompt is not None:
        raise InputError("give prompt= or prompt_name=, not both")
    if how.prompt_name not in prompts:
        known = ", ".join(sorted(prompts)) or "none: pass prompt= instead"
        raise InputError(f"no prompt is called {how.prompt_name!r}; this model's are {known}")
    return prompts[how.prompt_name]


def _width(how: EmbedOptions, model: Model) -> int:
    n_embd = model.n_embd_out
    width = n_embd if how.dimensions is None else how.dimensions
    if not isinstance(width, (int, np.integer)) or not 1 <= width <= n_embd:
        raise InputError(f"dimensions={width} is not from 1 to the model's {n_embd}")
    quantize.check(how.dtype, int(width), how.ranges)
    return int(width)


def _window(how: EmbedOptions, limit: int, n_around: int) -> int:
    """Return the tokens of a window without what stands around them."""
    whole = limit if how.chunk is True else min(int(how.chunk), limit)
    size = whole - n_around
    if size < 1 or not 0 <= how.chunk_overlap < size:
        raise InputError(
            f"windows of {whole} tokens, {n_around} of them special or of the prompt, cannot "
            f"overlap by chunk_overlap={how.chunk_overlap}"
        )
    return size
