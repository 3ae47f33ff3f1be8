"""`Llama`: what people import."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from llamacrab._core import (
    Batch,
    Context,
    Model,
    PoolingType,
    SplitMode,
    default_n_threads,
    devices,
)
from llamacrab._extras import require
from llamacrab.default_model import resolve
from llamacrab.errors import ClosedError, InputError, LlamaError, NumericalError, PoolingError
from llamacrab.packer import pack
from llamacrab.rerank import PairTemplate
from llamacrab.similarity import normalize as l2_normalize
from llamacrab.tokens import encode

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

# A text longer than this many tokens needs an explicit n_ctx: the buffers for it are large.
N_CTX_DEFAULT_MAX = 8192
# Tokens that a pack aims at on a CPU, where larger packs cost more a token: an encoder's attention
# spans the whole pack. A GPU wants all it can get.
PACK_TOKENS_CPU = 256
PACK_TOKENS_GPU = 4096
N_SEQ_MAX = 256


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How texts become vectors. A keyword given to the call itself wins over the options.

    Parameters
    ----------
    normalize : bool
        Divide each vector by its L2 norm.
    start_token : bool
        Begin with the token that the model was trained to see first (BOS or CLS), if it has one.
    truncate : bool
        Cut a text that is too long, keeping its closing special tokens, instead of raising.
    parse_special : bool
        Read the spelling of a special token, such as ``[SEP]``, in a text as that token.
    """

    normalize: bool = True
    start_token: bool = True
    truncate: bool = False
    parse_special: bool = False


class Llama:
    """A model that embeds and reranks. Safe to share between threads.

    Parameters
    ----------
    path : str or os.PathLike, optional
        A GGUF file; by default all-MiniLM-L6-v2, fetched and converted on first use.
    n_ctx : int
        Tokens of the longest text that can be embedded; 0: what the model was trained with, at most
        8192.
    n_ubatch : int
        Tokens that can be computed together, at least `n_ctx` unless the model is causal and pools
        by LAST or RANK; 0: enough for `n_ctx` and `pack_tokens`.
    n_seq_max : int
        Texts that can be computed together, at most 256; 0: one for every 4 tokens of a pack.
    pack_tokens : int
        Tokens that a pack of texts aims at; 0: 256 on a CPU, `n_ubatch` or 4096 on a GPU. Changes
        how fast rows come, not what they are.
    n_threads : int
        Threads to compute with; 0: as many as the process may use.
    n_gpu_layers : int
        Layers to put on GPUs, if this build has any; -1: all.
    main_gpu : int
        The GPU that takes the whole model under ``SplitMode.NONE``.
    split_mode : SplitMode
        How several GPUs share the model.
    pooling_type : PoolingType
        How rows of tokens become the row of a text; UNSPECIFIED: what the GGUF says, else MEAN.
    flash_attn : bool or "auto"
        Flash attention.
    use_mmap, use_mlock : bool
        Map the file instead of reading it; keep it from being swapped out.

    Raises
    ------
    ModelError, ContextError, PoolingError, AllocationError
        The model or the sizes cannot be used; see `llamacrab.errors`.

    Examples
    --------
    >>> with Llama() as llama:
    ...     llama.embed_texts(["a crab", "a lobster"]).shape
    (2, 384)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int = 0,
        n_ubatch: int = 0,
        n_seq_max: int = 0,
        pack_tokens: int = 0,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
        main_gpu: int = 0,
        split_mode: SplitMode = SplitMode.LAYER,
        pooling_type: PoolingType = PoolingType.UNSPECIFIED,
        flash_attn: bool | str = "auto",
        use_mmap: bool = True,
        use_mlock: bool = False,
    ) -> None:
        self.model = Model(
            resolve(path),
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            split_mode=split_mode,
            use_mmap=use_mmap,
            use_mlock=use_mlock,
        )
        n_ctx = n_ctx or min(self.model.n_ctx_train, N_CTX_DEFAULT_MAX)
        if not pack_tokens:
            on_gpu = n_gpu_layers != 0 and _has_gpu()
            pack_tokens = n_ubatch or PACK_TOKENS_GPU if on_gpu else PACK_TOKENS_CPU
        n_ubatch = n_ubatch or max(n_ctx, pack_tokens)
        n_seq_max = n_seq_max or max(1, min(N_SEQ_MAX, pack_tokens // 4))
        self._context = Context(
            self.model,
            # The cells of a causal model serve all sequences of a pack together, so there must be
            # enough for a pack; a model with a table of positions takes no more than it has.
            n_ctx=n_ctx if self.model.has_position_table else max(n_ctx, pack_tokens),
            n_batch=max(n_ctx, n_ubatch, n_seq_max),
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_threads=n_threads or default_n_threads(),
            pooling_type=pooling_type,
            flash_attn=flash_attn,
        )
        self._batch = Batch(self._context.n_batch)
        self._pack_tokens = min(pack_tokens, self._context.n_batch, self._context.n_ubatch)
        self._limit = min(n_ctx, self._context.n_tokens_max)
        # One context is for one thread at a time; the lock is held for a pack: callers alternate.
        self._lock = threading.Lock()

    def close(self) -> None:
        """Free the model. A call that is running in another thread finishes its pack first."""
        with self._lock:
            self._context.close()
            self.model.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.model.closed:
            return f"<Llama {self.model.path!r} (closed)>"
        return (
            f"<Llama {self.model.path!r} pooling_type={self.pooling_type.name} "
            f"n_embd={self.n_embd} n_ctx={self.n_ctx}>"
        )

    @property
    def n_embd(self) -> int:
        """Width of an embedding."""
        return self.model.n_embd_out

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest text that can be embedded, special tokens counted."""
        return self._limit

    @property
    def pooling_type(self) -> PoolingType:
        """How rows of tokens become the row of a text."""
        return self._context.pooling_type

    def embed(
        self,
        text: str | Sequence[int] | np.ndarray,
        *,
        options: EmbedOptions | None = None,
        normalize: bool | None = None,
        start_token: bool | None = None,
        truncate: bool | None = None,
        parse_special: bool | None = None,
    ) -> np.ndarray:
        """Return the vector of one text.

        Parameters
        ----------
        text : str or sequence of int
            A text, or token ids, to which no special token is added.
        options : EmbedOptions, optional
            How; by default ``EmbedOptions()``.
        normalize, start_token, truncate, parse_special : bool, optional
            Fields of `EmbedOptions`, where this call differs from `options`.

        Returns
        -------
        ndarray of float32, shape (n_embd,)
            With ``PoolingType.NONE`` a row for every token: shape (n_tokens, n_embd).

        Raises
        ------
        InputError
            The text is too long (`TextTooLongError`), has no tokens, or is of a wrong type.
        PoolingError
            The model is a reranker.
        """
        how = _merge(options, normalize, start_token, truncate, parse_special)
        row: np.ndarray = self.embed_texts([text], options=how)[0]
        return row

    def embed_texts(
        self,
        texts: Iterable[str | Sequence[int] | np.ndarray],
        *,
        options: EmbedOptions | None = None,
        normalize: bool | None = None,
        start_token: bool | None = None,
        truncate: bool | None = None,
        parse_special: bool | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Return the vectors of many texts, in the order of the texts.

        Texts are computed in packs. A row does not depend on its neighbours, but for the last bits:
        the cosine between a text's row alone and in any pack is at least 0.9999.

        Parameters
        ----------
        texts : iterable of str or of sequences of int
            The texts; all of them are checked before the first is computed.
        options : EmbedOptions, optional
            How; by default ``EmbedOptions()``.
        normalize, start_token, truncate, parse_special : bool, optional
            Fields of `EmbedOptions`, where this call differs from `options`.
        progress : bool
            Show a progress bar (extra ``progress``).

        Returns
        -------
        ndarray of float32, shape (n_texts, n_embd)
            With ``PoolingType.NONE`` a list of arrays, each of shape (n_tokens, n_embd).

        Raises
        ------
        InputError
            A text is too long, has no tokens, or is of a wrong type; the message has its index.
        PoolingError
            The model is a reranker.
        DecodeError, NumericalError
            llama.cpp failed in the middle. The exception has ``rows``, what this call would have
            returned, and ``done``, a bool for each text that tells whether its row is in `rows`.
        """
        if self.pooling_type == PoolingType.RANK:
            raise PoolingError("this model is a reranker (pooling RANK): use rerank()")
        if isinstance(texts, (str, bytes)):
            raise InputError("embed_texts takes a list of texts; for one text use embed()")
        how = _merge(options, normalize, start_token, truncate, parse_special)
        encoded = [
            encode(
                self.model.vocab,
                text,
                limit=self._limit,
                truncate=how.truncate,
                start_token=how.start_token,
                parse_special=how.parse_special,
                index=i,
            )
            for i, text in enumerate(texts)
        ]
        rows = self._compute(encoded, progress=progress)
        if how.normalize:
            for block in rows if isinstance(rows, list) else [rows]:
                l2_normalize(block, out=block)
        return cast("np.ndarray", rows)

    def rerank(self, query: str, documents: Iterable[str], *, truncate: bool = False) -> np.ndarray:
        """Return how well each document answers the query, by the model's own head.

        Parameters
        ----------
        query : str
            The query.
        documents : iterable of str
            The documents.
        truncate : bool
            Cut a document that is too long beside the query, instead of raising.

        Returns
        -------
        ndarray of float32, shape (n_documents,)
            Scores in the order of the documents, higher is better. They are the head's raw outputs,
            but for Qwen3 rerankers, where llama.cpp's graph already gives the probability of "yes".
            A head with several classes gives shape (n_documents, n_cls_out).

        Raises
        ------
        PoolingError
            The model has no classification head.
        TextTooLongError
            A pair is too long.
        """
        if self.pooling_type != PoolingType.RANK:
            raise PoolingError(
                "this model is used as an embedder"
                + (
                    ": make it with pooling_type=PoolingType.RANK to rerank"
                    if self.model.has_rank_head
                    else " and has no classification head: reranking needs a reranker's GGUF"
                )
            )
        if isinstance(documents, (str, bytes)):
            raise InputError("rerank takes a list of documents")
        template = PairTemplate(self.model, query)
        encoded = [
            template.encode(document, limit=self._limit, truncate=truncate, index=i)
            for i, document in enumerate(documents)
        ]
        scores = cast("np.ndarray", self._compute(encoded))
        # A Qwen3 head's two outputs are the softmax over yes and no: one number says all.
        if scores.shape[1] == 1 or self.model.cls_labels == ["yes", "no"]:
            return np.ascontiguousarray(scores[:, 0])
        return scores

    def _compute(
        self, encoded: list[np.ndarray], *, progress: bool = False
    ) -> np.ndarray | list[np.ndarray]:
        """Return the rows of encoded texts, in order, computed pack by pack."""
        pooled = self.pooling_type != PoolingType.NONE
        n_out = self._context.n_out
        rows: np.ndarray | list[np.ndarray] = (
            np.zeros((len(encoded), n_out), dtype=np.float32)
            if pooled
            else [np.empty((0, n_out), dtype=np.float32)] * len(encoded)
        )
        done = np.zeros(len(encoded), dtype=bool)
        lengths = [len(ids) for ids in encoded]
        bar = require("tqdm", extra="progress").tqdm if progress else None
        ticker = bar(total=len(encoded), unit="text") if bar else None
        try:
            for texts in pack(lengths, n_tokens=self._pack_tokens, n_seqs=self._context.n_seq_max):
                self._compute_pack(texts.tolist(), encoded, rows)
                done[texts] = True
                if ticker:
                    ticker.update(len(texts))
        except LlamaError as error:
            error.rows, error.done = rows, done
            raise
        finally:
            if ticker:
                ticker.close()
        return rows

    def _compute_pack(
        self, texts: list[int], encoded: list[np.ndarray], rows: np.ndarray | list[np.ndarray]
    ) -> None:
        with self._lock:
            if self._context.closed:
                raise ClosedError("the Llama is closed")
            self._batch.clear()
            for seq_id, i in enumerate(texts):
                self._batch.add(seq_id, encoded[i])
            self._context.clear()
            self._context.decode(self._batch)
            start = 0
            for seq_id, i in enumerate(texts):
                if isinstance(rows, list):
                    stop = start + len(encoded[i])
                    rows[i] = self._context.token_rows(start, stop)
                    start = stop
                    finite = bool(np.isfinite(rows[i]).all())
                else:
                    finite = self._context.copy_seq_row(seq_id, rows[i])
                if not finite:
                    raise NumericalError(i)


def _merge(
    options: EmbedOptions | None,
    normalize: bool | None,
    start_token: bool | None,
    truncate: bool | None,
    parse_special: bool | None,
) -> EmbedOptions:
    given = {
        "normalize": normalize,
        "start_token": start_token,
        "truncate": truncate,
        "parse_special": parse_special,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    return replace(options or EmbedOptions(), **changed)


def _has_gpu() -> bool:
    return any(device["type"] in ("GPU", "IGPU") for device in devices())
