"""Requests that embed: from texts to token ids, and from rows to embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab import quantize
from llamacrab._core import Model, PoolingType, Tokenization
from llamacrab.errors import InputError, LlamaError
from llamacrab.options import EmbedOptions, Norm
from llamacrab.requests.chunking import Windows
from llamacrab.requests.offsets import kept, token_offsets
from llamacrab.requests.prompts import ids_of, split_at_special

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llamacrab._core import Job, Scheduler

# No text has more tokens.
NO_LIMIT = 2**31 - 1


class EmbedRequest:
    """One call to embed texts; see `llamacrab._engine.Request`.

    Parameters
    ----------
    pipeline : EmbedPipeline
        How the texts are embedded.
    texts : list of str or of sequences of int
        The texts.
    single : bool
        There is one text, and the result is its embedding instead of a list or matrix.
    dedup : bool
        Compute equal texts once.
    first : int
        The caller's number for the first text.
    """

    def __init__(
        self,
        pipeline: EmbedPipeline,
        texts: list[Any],
        *,
        single: bool = False,
        dedup: bool = True,
        first: int = 0,
    ) -> None:
        self._pipeline = pipeline
        self._single = single
        self._dedup = dedup
        self._first = first
        self._n_texts = len(texts)
        self._windows: Windows | None = None
        self.inputs = texts

    def job(self, scheduler: Scheduler) -> Job:
        """Split the texts into windows if the options say so, and return a job for all inputs."""
        pipeline = self._pipeline
        self._windows = pipeline.windows(self.inputs)
        if self._windows is not None:
            self.inputs = self._windows.inputs
        return scheduler.job(
            pipeline.tokenization,
            len(self.inputs),
            norm=pipeline.norm.kind,
            p=pipeline.norm.p,
            width=pipeline.width,
            dedup=self._dedup,
        )

    def finish(self, rows: Any) -> Any:
        """Return the embeddings."""
        embeddings = self._pipeline.finish(rows, self._windows)
        return embeddings[0] if self._single else embeddings

    def remap_error(self, error: LlamaError) -> None:
        """Make an error name the caller's text, and hold the embeddings computed so far."""
        if error.rows is None:  # it failed before there was a job
            error.rows = self._pipeline.empty(self._n_texts)
            error.done = np.zeros(self._n_texts, dtype=bool)
        else:
            error.rows = self._pipeline.finish(error.rows, self._windows)
            if self._windows is not None:
                error.done = self._windows.done(error.done)
                if error.index is not None:
                    error.renumber(self._windows.text_of(error.index), "in one of its windows")
        if self._first and error.index is not None:
            error.renumber(self._first + error.index)


class EmbedPipeline:
    """From texts to inputs, and from rows to embeddings, for calls with the same options.

    Parameters
    ----------
    options : EmbedOptions
        The options of the call; they are checked here.
    model : Model
        The model.
    pooling_type : PoolingType
        The pooling of the context.
    limit : int
        Tokens that fit.
    prompts : mapping of str to str
        The model's own prompts, by name.
    larger : str
        How to make `limit` larger, for error messages.

    Attributes
    ----------
    options : EmbedOptions
        The parameter.
    tokenization : Tokenization
        Turns texts into token ids.
    norm, width : float, int
        Norm and number of values of the rows that the scheduler returns.
    """

    def __init__(
        self,
        options: EmbedOptions,
        model: Model,
        pooling_type: PoolingType,
        limit: int,
        prompts: Mapping[str, str],
        larger: str = "",
    ) -> None:
        self.options = options
        self.pooled = pooling_type != PoolingType.NONE
        self.width = _width(options, model)
        # The rows of windows are averaged first, and then normalized.
        self.norm = Norm("none") if options.chunk else options.norm
        vocab = model.vocab
        prompt = _prompt(options, prompts)
        self._prefix_text = ""
        prefix = _special("start_token", options.start_token, vocab.prefix_ids, len(vocab))
        suffix = _special("end_token", options.end_token, vocab.suffix_ids, len(vocab))
        if prompt:
            # The end of the prompt is tokenized together with the text, as tokens may span both.
            *before, touching = split_at_special(vocab, prompt)
            prefix, self._prefix_text = (*prefix, *ids_of(vocab, before)), str(touching)
        self._n_around = (len(prefix), len(suffix))
        around: dict[str, Any] = {
            "prefix_ids": prefix,
            "suffix_ids": suffix,
            "prefix_text": self._prefix_text,
            "parse_special": options.parse_special,
        }
        self.tokenization = Tokenization(
            vocab,
            limit=limit,
            truncate=options.truncate,
            text_only=bool(prompt) and not options.chunk,
            advice="pass truncate=True to cut it"
            + (", or chunk=True to average over windows of it" if self.pooled else ""),
            larger=larger,
            **around,
        )
        self._uncut = Tokenization(vocab, limit=NO_LIMIT, **around)
        self._chunking: dict[str, Any] | None = None
        if options.chunk:
            if not self.pooled:
                raise InputError(
                    "chunk= needs a pooling: with PoolingType.NONE nothing is averaged"
                )
            before = [*prefix, *(ids_of(vocab, [self._prefix_text]) if prompt else ())]
            self._chunking = {
                "prefix_ids": before,
                "suffix_ids": suffix,
                "size": _window(options, limit, len(before) + len(suffix)),
                "overlap": options.chunk_overlap,
                "tokenization": Tokenization(
                    vocab,
                    limit=NO_LIMIT,
                    parse_special=options.parse_special,
                    prefix_ids=(),
                    suffix_ids=(),
                    text_only=bool(prompt),
                ),
            }

    def offsets(self, text: Any, ids: np.ndarray) -> np.ndarray:
        """Return where in a text its tokens come from, shape (n, 2); see `token_offsets`."""
        if not isinstance(text, str):
            return np.zeros((len(ids), 2), dtype=np.int32)
        full = self._uncut.tokenize(text)
        spans = token_offsets(
            self._uncut.vocab,
            self._prefix_text + text,
            full,
            n_prefix=self._n_around[0],
            n_suffix=self._n_around[1],
        )
        places: np.ndarray = np.maximum(spans[kept(full, ids)] - len(self._prefix_text), 0)
        return places

    def windows(self, texts: list[Any]) -> Windows | None:
        """Return the texts as windows of tokens, or None without ``chunk``."""
        return None if self._chunking is None else Windows(texts, **self._chunking)

    def finish(self, rows: Any, windows: Windows | None) -> Any:
        """Turn the rows that the scheduler computed into embeddings."""
        options = self.options
        if options.dtype == "float32" and windows is None:
            return rows
        if not self.pooled:
            return [quantize.quantize(row, options.dtype, ranges=options.ranges) for row in rows]
        if windows is not None:
            rows = normalized(windows.pool(rows), options.norm)
        return quantize.quantize(rows, options.dtype, ranges=options.ranges)

    def empty(self, n_texts: int) -> Any:
        """Return placeholders for the embeddings of texts that were not computed."""
        if not self.pooled:
            return self.finish([np.empty((0, self.width), dtype=np.float32)] * n_texts, None)
        return self.finish(np.zeros((n_texts, self.width), dtype=np.float32), None)


def normalized(rows: np.ndarray, norm: Norm) -> np.ndarray:
    """Divide each row by its norm, as native/decoder.cpp does."""
    if norm.kind == "none":
        return rows
    order = norm.p if norm.kind == "p" else np.inf
    lengths = np.linalg.norm(rows.astype(np.float64), ord=order, axis=-1, keepdims=True)
    lengths[lengths == 0] = 1  # a text that failed has a row of zeros
    scaled: np.ndarray = rows / (lengths / 32760 if norm.kind == "int16" else lengths)
    return scaled.astype(np.float32)


def _special(name: str, option: bool | int, own: Sequence[int], n_tokens: int) -> tuple[int, ...]:
    """Return the tokens for one end of a text; `own` are those of the model."""
    if isinstance(option, (bool, np.bool_)):
        return tuple(own) if option else ()
    if not isinstance(option, (int, np.integer)) or not 0 <= option < n_tokens:
        raise InputError(f"{name} must be a bool or an id in range({n_tokens}), not {option!r}")
    return (int(option),)


def _prompt(options: EmbedOptions, prompts: Mapping[str, str]) -> str:
    if options.prompt_name is None:
        return options.prompt or ""
    if options.prompt is not None:
        raise InputError("give prompt= or prompt_name=, not both")
    if options.prompt_name not in prompts:
        known = ", ".join(sorted(prompts)) or "none, pass prompt= instead"
        raise InputError(f"there is no prompt {options.prompt_name!r}; this model has: {known}")
    return prompts[options.prompt_name]


def _width(options: EmbedOptions, model: Model) -> int:
    n_embd = model.n_embd_out
    width = n_embd if options.dimensions is None else options.dimensions
    if not isinstance(width, (int, np.integer)) or not 1 <= width <= n_embd:
        raise InputError(f"dimensions={width} is not between 1 and the model's {n_embd}")
    quantize.check(options.dtype, int(width), options.ranges)
    return int(width)


def _window(options: EmbedOptions, limit: int, n_around: int) -> int:
    """Return the tokens per window, without those around it."""
    whole = limit if options.chunk is True else min(int(options.chunk), limit)
    size = whole - n_around
    if size < 1 or not 0 <= options.chunk_overlap < size:
        raise InputError(
            f"windows of {whole} tokens ({n_around} of them special tokens or prompt) cannot "
            f"overlap by chunk_overlap={options.chunk_overlap}"
        )
    return size
