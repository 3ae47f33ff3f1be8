"""`Llama`: what people import."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np

from llamacrab import aio, tuning
from llamacrab._core import Encoder, Job, Model, PoolingType, Scheduler, SplitMode
from llamacrab._extras import require
from llamacrab.default_model import resolve
from llamacrab.doubts import log_doubts, log_missing_gpu
from llamacrab.errors import (
    AllocationError,
    ClosedError,
    DeviceError,
    InputError,
    LlamaError,
    PoolingError,
)
from llamacrab.options import EmbedKeywords, EmbedOptions, merge
from llamacrab.plan import Plan, Prepared
from llamacrab.prompts import prompts_of
from llamacrab.rerank import Pairs, PairTemplate, Scoring, warn_of_wrong_scores

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from typing import TypeAlias

    from typing_extensions import Unpack

    from llamacrab.rerank import Activation, RerankResult, Truncate

    Text: TypeAlias = str | Sequence[int] | np.ndarray

# A text longer than this many tokens needs an explicit n_ctx: the buffers for it are large.
N_CTX_DEFAULT_MAX = 8192
N_SEQ_MAX = 256
# Texts given to the scheduler between two looks at progress.
TEXTS_A_STEP = 256
# A job that has done so many texts, and goes on, may vary its packs to find the best size.
CALIBRATION_TEXTS = 1024


# Plans that are kept, one for every set of options in use.
PLANS_MAX = 64


@dataclass(frozen=True)
class TokenEmbeddings:
    """The vectors of a text's tokens.

    Attributes
    ----------
    ids : ndarray of int32, shape (n_tokens,)
        The tokens, special ones included.
    offsets : ndarray of int32, shape (n_tokens, 2)
        Where in the text each token comes from: ``text[start:stop]``; (0, 0) for special tokens.
    vectors : ndarray, shape (n_tokens, n_embd)
        A row for each token.
    """

    ids: np.ndarray
    offsets: np.ndarray
    vectors: np.ndarray


class Llama:
    """A model that embeds and reranks. Share one between all threads: their texts share packs.

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
        Tokens that a pack of texts aims at; 0: what was measured to be fastest, or a guess. Changes
        how fast rows come, not what they are.
    n_contexts : int
        Packs computed at the same time, each by its own context and native thread; 0: what was
        measured, or as many as there are CPUs for `n_threads` each.
    n_threads : int
        Threads that compute a pack; 0: what was measured, or the CPUs that the process may use,
        shared between the contexts.
    n_gpu_layers : int
        Layers to put on GPUs, if this build has any; -1: all.
    main_gpu : int
        The GPU that takes the whole model under ``SplitMode.NONE``.
    split_mode : SplitMode
        How several GPUs share the model.
    devices : sequence of str, optional
        Instead of one model that all GPUs share, a copy of it on each of these devices, by the
        names that ``llamacrab info --devices`` shows, all behind the one queue. They should be
        equally fast. `n_contexts` and `n_threads` are those of each copy.
    pooling_type : PoolingType
        How rows of tokens become the row of a text; UNSPECIFIED: what the GGUF says, else MEAN.
    flash_attn : bool or "auto"
        Flash attention.
    use_mmap, use_mlock : bool
        Map the file instead of reading it; keep it from being swapped out.
    cpu_backend : {"auto", "llamacrab", "ggml", "int8"}
        What computes on the CPU: llamacrab's own kernels, llama.cpp's, or the former with products
        in 8 bits; "auto": what the environment variable ``LLAMACRAB_CPU_BACKEND`` says, else the
        faster of the first two. See docs/kernels.md.
    queue_tokens : int
        Tokens that may wait before a call that brings more must; 0: 32 packs a context.
    deterministic : bool
        Compute every text alone, so that its row is the same to the last bit whatever else is
        computed. Slower: see docs/threads.md.
    on_pack : callable, optional
        Called after every pack, on a thread of its own, with a dict of the fields that
        `recent_packs` has. If it is so slow that it falls 4096 packs behind, it misses some.

    Attributes
    ----------
    model : Model
        The weights, and the vocabulary as ``model.vocab``.
    prompts : dict of str to str
        The model's own prompts by name; empty where none are known.
    layouts : list of llamacrab.tuning.Layout
        How each of `devices` computes.
    layout : llamacrab.tuning.Layout
        Contexts, threads and tokens a pack that are in use.
    backends : list of str
        What computes: ``"ggml"``, one of llamacrab's sets of kernels such as ``"llamacrab avx2"``,
        or a kind of GPU such as ``"CUDA"``; several where the copies on `devices` differ.
    deterministic : bool
        As it was given.

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
        n_contexts: int = 0,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
        main_gpu: int = 0,
        split_mode: SplitMode = SplitMode.LAYER,
        devices: Sequence[str] | None = None,
        pooling_type: PoolingType = PoolingType.UNSPECIFIED,
        flash_attn: bool | str = "auto",
        use_mmap: bool = True,
        use_mlock: bool = False,
        cpu_backend: Literal["auto", "llamacrab", "ggml", "int8"] = "auto",
        queue_tokens: int = 0,
        deterministic: bool = False,
        on_pack: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        if isinstance(devices, str) or (devices is not None and not devices):
            raise DeviceError(f"devices must be a list of names, such as ['CPU'], not {devices!r}")
        path = resolve(path)
        self._models = [
            Model(
                path,
                n_gpu_layers=n_gpu_layers,
                main_gpu=main_gpu,
                split_mode=split_mode,
                device=device,
                use_mmap=use_mmap,
                use_mlock=use_mlock,
                cpu_backend=cpu_backend,
            )
            for device in (devices or (None,))
        ]
        self.model = self._models[0]
        n_ctx = n_ctx or min(self.model.n_ctx_train, N_CTX_DEFAULT_MAX)
        on_gpu = [
            n_gpu_layers != 0 and tuning.has_gpu(None if device is None else [device])
            for device in (devices or (None,))
        ]
        self._on_gpu = on_gpu[0]
        self.backends = tuning.backends(self._models, on_gpu)
        self.deterministic = deterministic
        given = tuning.Layout(n_contexts, n_threads, pack_tokens or n_ubatch, flash_attn)
        known = [
            tuning.remembered(model, gpu) for model, gpu in zip(self._models, on_gpu, strict=True)
        ]
        self.layouts = [
            tuning.choose(
                layout,
                on_gpu=gpu,
                given=given,
                n_replicas=on_gpu.count(gpu),
                cpu_backend=model.cpu_backend,
            )
            for model, gpu, layout in zip(self._models, on_gpu, known, strict=True)
        ]
        while True:
            try:
                self._scheduler = self._start(
                    n_ctx,
                    n_ubatch=n_ubatch,
                    n_seq_max=n_seq_max,
                    pooling_type=pooling_type,
                    queue_tokens=queue_tokens,
                    deterministic=deterministic,
                    on_pack=on_pack,
                )
                break
            except AllocationError:
                # A GPU may have no room for a pack that others have room for.
                most = max(layout.pack_tokens for layout in self.layouts)
                if given.pack_tokens or most <= tuning.PACK_TOKENS_CPU:
                    raise
                self.layouts = [
                    replace(layout, pack_tokens=min(layout.pack_tokens, most // 2))
                    for layout in self.layouts
                ]
        self._limit = min(n_ctx, self._scheduler.context.n_tokens_max)
        # Explicit sizes are kept; so is what has been measured before.
        may_tune = known == [None] and not (given.pack_tokens or deterministic or devices)
        self._calibration = tuning.Calibration(self._scheduler) if may_tune else None
        self.prompts = prompts_of(self.model.metadata)
        self._plans: dict[str, Plan] = {}
        if devices is None and n_gpu_layers != 0:
            log_missing_gpu()
        log_doubts(self.model, self.pooling_type, n_ctx)
        if self.pooling_type == PoolingType.RANK:
            warn_of_wrong_scores(self.model)

    @property
    def layout(self) -> tuning.Layout:
        """How the model is computed, on the first of its devices; `layouts` has all."""
        return self.layouts[0]

    def _start(self, n_ctx: int, *, n_ubatch: int, n_seq_max: int, **how: Any) -> Scheduler:
        """Return a scheduler for texts of up to `n_ctx` tokens, and packs as `layouts` has them."""

        def sizes(layout: tuning.Layout) -> dict[str, Any]:
            ubatch = n_ubatch or max(n_ctx, layout.pack_tokens)
            seqs = n_seq_max or max(1, min(N_SEQ_MAX, layout.pack_tokens // 4))
            return {
                "n_contexts": layout.n_contexts,
                "pack_tokens": layout.pack_tokens,
                # The cells of a causal model hold a pack, and what its texts share, which is no
                # more than a text; a model with a table of positions takes no more than it has.
                "n_ctx": n_ctx + (0 if self.model.has_position_table else layout.pack_tokens),
                "n_batch": max(n_ctx, ubatch, seqs),
                "n_ubatch": ubatch,
                "n_seq_max": seqs,
                "n_threads": layout.n_threads,
                "flash_attn": layout.flash_attn,
            }

        first, *others = map(sizes, self.layouts)
        replicas = list(zip(self._models[1:], others, strict=True))
        return Scheduler(self.model, replicas=replicas, **first, **how)

    def close(self) -> None:
        """Stop all work at once and free the model; calls that are running raise `ClosedError`."""
        self._scheduler.close()
        for model in self._models:
            model.close()

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
        return self._scheduler.context.pooling_type

    # ------------------------------------------------------------------------------- embedding

    def embed(
        self,
        text: Text,
        *,
        options: EmbedOptions | None = None,
        timeout: float | None = None,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Return the vector of one text.

        Parameters
        ----------
        text : str or sequence of int
            A text, or token ids, to which no special token is added.
        options : EmbedOptions, optional
            How; by default ``EmbedOptions()``.
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.
        **changes
            Fields of `EmbedOptions`, such as ``normalize=False`` or ``truncate=True``, where this
            call differs from `options`.

        Returns
        -------
        ndarray of float32, shape (n_embd,)
            Of another dtype or width where the options say so. With ``PoolingType.NONE`` a row for
            every token: shape (n_tokens, n_embd).

        Raises
        ------
        InputError
            The text is too long (`TextTooLongError`), has no tokens, or is of a wrong type; or an
            option makes no sense for this model.
        PoolingError
            The model is a reranker.
        """
        plan = self._plan(merge(options, changes))
        return cast("np.ndarray", self._embed(plan, [text], timeout=timeout)[0])

    def embed_texts(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        progress: bool = False,
        timeout: float | None = None,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Return the vectors of many texts, in their order.

        Parameters
        ----------
        texts : iterable of str or of sequences of int
            Texts, or token ids, to which no special token is added.
        options : EmbedOptions, optional
            How; by default ``EmbedOptions()``.
        dedup : bool
            Compute equal texts that are in the queue at the same time once.
        progress : bool
            Show a progress bar (extra ``progress``).
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.
        **changes
            Fields of `EmbedOptions`, where this call differs from `options`.

        Returns
        -------
        ndarray of float32, shape (n_texts, n_embd)
            Of another dtype or width where the options say so. With ``PoolingType.NONE`` a list of
            arrays, each of shape (n_tokens, n_embd).

        Raises
        ------
        InputError
            A text is too long, has no tokens, or is of a wrong type; the message has its index. Or
            an option makes no sense for this model.
        PoolingError
            The model is a reranker.
        DecodeError, NumericalError, AllocationError, LlamaTimeoutError, ClosedError
            It failed in the middle.

        Notes
        -----
        Texts are encoded while earlier ones are computed, so any exception may come late. Nothing
        is lost: a `LlamaError` has ``rows``, what this call would have returned, and ``done``, a
        bool for each text that tells whether its row is there.
        """
        plan = self._plan(merge(options, changes))
        texts = _as_list(texts, "embed_texts")
        rows = self._embed(plan, texts, dedup=dedup, timeout=timeout, progress=progress)
        return cast("np.ndarray", rows)

    def embed_query(
        self, text: Text, *, options: EmbedOptions | None = None, **changes: Unpack[EmbedKeywords]
    ) -> np.ndarray:
        """Return the vector of a search query: `embed` with the model's prompt for queries.

        A model whose prompts are not known (`prompts`) gets none.
        """
        how = self._with_prompt("query", merge(options, changes))
        return self.embed(text, options=how)

    def embed_documents(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Return the vectors of documents: `embed_texts` with the model's prompt for documents.

        A model whose prompts are not known (`prompts`) gets none.
        """
        how = self._with_prompt("document", merge(options, changes))
        return self.embed_texts(_as_list(texts, "embed_documents"), options=how)

    def embed_tokens(
        self, text: Text, *, options: EmbedOptions | None = None, **changes: Unpack[EmbedKeywords]
    ) -> TokenEmbeddings:
        """Return the vectors of a text's tokens, and where in the text each token comes from.

        Parameters
        ----------
        text : str or sequence of int
            A text; or token ids, which come from no text, so that all offsets are (0, 0).
        options : EmbedOptions, optional
            How; by default ``EmbedOptions()``.
        **changes
            Fields of `EmbedOptions`, where this call differs from `options`.

        Raises
        ------
        PoolingError
            The `Llama` was not made with ``pooling_type=PoolingType.NONE``.
        """
        if self.pooling_type != PoolingType.NONE:
            raise PoolingError(
                f"this Llama pools ({self.pooling_type.name}): make one with "
                "pooling_type=PoolingType.NONE for the vectors of tokens"
            )
        plan = self._plan(merge(options, changes))
        ids = plan.encoder.encode(text)
        as_it_is = self._plan(replace(plan.how, prompt=None, prompt_name=None))
        return TokenEmbeddings(ids, plan.offsets(text, ids), self._embed(as_it_is, [ids])[0])

    def embed_iter(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        batch_size: int = 1024,
        **changes: Unpack[EmbedKeywords],
    ) -> Iterator[np.ndarray]:
        """Yield the vectors of a stream of texts, in order, in bounded memory.

        At most four blocks of `batch_size` texts are held at a time: one that is yielded, and those
        that are being read and computed meanwhile.

        Parameters
        ----------
        texts : iterable of str or of sequences of int
            The texts; a generator is read as vectors are taken.
        options, dedup, **changes
            As for `embed_texts`.
        batch_size : int
            Texts a block.

        Yields
        ------
        ndarray of float32, shape (batch_size, n_embd)
            The last one may be shorter. With ``PoolingType.NONE`` a list of arrays.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        if isinstance(texts, (str, bytes)):
            raise InputError("embed_iter takes an iterable of texts; for one text use embed()")
        # What cannot work fails here, not at the first block.
        return self._stream(iter(texts), self._plan(merge(options, changes)), dedup, batch_size)

    def _stream(
        self, texts: Iterator[Text], plan: Plan, dedup: bool, batch_size: int
    ) -> Iterator[np.ndarray]:
        blocks: list[tuple[Job, Prepared, int]] = []
        first = 0
        try:
            while True:
                block = list(itertools.islice(texts, batch_size))
                if block:
                    work = plan.prepare(block)
                    job = self._job(work, dedup=dedup)
                    blocks.append((job, work, len(block)))
                    job.add(work.units)
                    job.seal()
                if not blocks:
                    return
                # Two blocks ahead keep the workers busy while the caller uses its rows.
                if not block or len(blocks) > 2:
                    job, work, n_texts = blocks[0]
                    rows = work.finish(job.wait())
                    del blocks[0]
                    first += n_texts
                    self._tune(first, over=not block)
                    yield cast("np.ndarray", rows)
        except LlamaError as error:
            if hasattr(error, "index"):
                error.args = (f"{error} (counted from text {first} of the stream)",)
            raise
        finally:
            for job, _, _ in blocks:
                job.cancel()

    def submit(
        self,
        texts: Text | Sequence[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        block: bool = True,
        **changes: Unpack[EmbedKeywords],
    ) -> Future[np.ndarray]:
        """Queue one text or a list of texts and return at once a future of their vectors.

        Parameters
        ----------
        texts : str, sequence of int, or list of them
            One text gives what `embed` returns, a list of texts what `embed_texts` returns.
        options, dedup, **changes
            As for `embed_texts`.
        block : bool
            Wait while the queue is full, else raise.

        Returns
        -------
        concurrent.futures.Future
            Its ``cancel()`` works until the vectors are there: what waits is dropped, and a pack
            that nobody else needs is stopped.

        Raises
        ------
        QueueFull
            The queue is full and `block` is false.
        """
        single = not isinstance(texts, list) or bool(
            texts and isinstance(texts[0], (int, np.integer))
        )
        batch = cast("list[Text]", [texts] if single else texts)
        work = self._plan(merge(options, changes)).prepare(batch)
        job = self._job(work, dedup=dedup)
        try:
            job.add(work.units, block=block)
        except BaseException:
            job.cancel()
            raise
        return self._scheduler.future(job, work.finish_one if single else work.finish)

    async def aembed(
        self, text: Text, *, options: EmbedOptions | None = None, **changes: Unpack[EmbedKeywords]
    ) -> np.ndarray:
        """Await the vector of one text; see `embed`."""
        work = self._plan(merge(options, changes)).prepare([text])
        rows = await aio.run(self._scheduler, self._job(work), work.units, work.finish_one)
        return cast("np.ndarray", rows)

    async def aembed_texts(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Await the vectors of many texts; see `embed_texts`.

        Cancelling the task drops what waits and does not disturb other callers.
        """
        work = self._plan(merge(options, changes)).prepare(_as_list(texts, "aembed_texts"))
        job = self._job(work, dedup=dedup)
        return cast("np.ndarray", await aio.run(self._scheduler, job, work.units, work.finish))

    # ------------------------------------------------------------------------------- reranking

    @property
    def labels(self) -> list[str]:
        """Names of the classes that the head of a reranker tells apart, if the GGUF has them."""
        return self.model.cls_labels

    @overload
    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: None = None,
        activation: Activation = "none",
        return_documents: Literal[False] = False,
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> np.ndarray: ...

    @overload
    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int,
        activation: Activation = "none",
        return_documents: bool = False,
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> list[RerankResult]: ...

    @overload
    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        activation: Activation = "none",
        return_documents: Literal[True],
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> list[RerankResult]: ...

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        activation: Activation = "none",
        return_documents: bool = False,
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> np.ndarray | list[RerankResult]:
        """Return how well each document answers the query, by the model's own head.

        Parameters
        ----------
        query : str
            The query.
        documents : iterable of str
            The documents.
        top_k : int, optional
            Return the best so many documents, sorted.
        activation : {"none", "sigmoid", "softmax"}
            Applied to the outputs of the head: the logistic function to each, or the softmax over
            the classes of a head that has several. Neither changes what llama.cpp has turned into
            probabilities already (Qwen3 rerankers).
        return_documents : bool
            Return sorted results that hold the documents themselves.
        truncate : bool or {"end", "start", "middle"}
            Which part of a document that is too long beside the query to cut away, instead of
            raising; True is the end. Never anything but the document.
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.

        Returns
        -------
        ndarray of float32, shape (n_documents,)
            Scores in the order of the documents, higher is better. They are the head's raw outputs,
            but for Qwen3 rerankers, where llama.cpp's graph already gives the probability of "yes".
            A head with several classes gives shape (n_documents, n_cls_out), named by `labels`.
        list of RerankResult
            With `top_k` or `return_documents`: ``index``, ``score`` and ``document``, best first.

        Raises
        ------
        PoolingError
            The model has no classification head.
        TextTooLongError
            A pair is too long.
        InputError
            An argument is wrong, or means nothing for this head: the softmax over one output, an
            order of documents by several classes.
        """
        documents = _as_list(documents, "rerank")
        scoring = self._scoring(
            activation, documents=documents, top_k=top_k, return_documents=return_documents
        )
        job = self._rerank_job(query, len(documents), truncate)
        return cast("np.ndarray", scoring(self._run(job, documents, timeout=timeout)))

    def rerank_pairs(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        activation: Activation = "none",
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Return how well the document of each pair answers the query of the pair.

        Pairs of all queries share packs, which is faster than a call of `rerank` for each query.

        Parameters
        ----------
        pairs : iterable of (str, str)
            Query and document of each.
        activation, truncate, timeout
            As for `rerank`.

        Returns
        -------
        ndarray of float32, shape (n_pairs,)
            Scores in the order of the pairs; with several classes shape (n_pairs, n_cls_out).
        """
        scoring = self._scoring(activation)
        wanted = self._pairs(_as_list(pairs, "rerank_pairs"), truncate)
        job = self._pairs_job(len(wanted))
        return cast("np.ndarray", scoring(self._run(job, wanted, timeout=timeout)))

    @overload
    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: None = None,
        activation: Activation = "none",
        return_documents: Literal[False] = False,
        truncate: Truncate = False,
    ) -> np.ndarray: ...

    @overload
    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int,
        activation: Activation = "none",
        return_documents: bool = False,
        truncate: Truncate = False,
    ) -> list[RerankResult]: ...

    @overload
    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        activation: Activation = "none",
        return_documents: Literal[True],
        truncate: Truncate = False,
    ) -> list[RerankResult]: ...

    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        activation: Activation = "none",
        return_documents: bool = False,
        truncate: Truncate = False,
    ) -> np.ndarray | list[RerankResult]:
        """Await how well each document answers the query; see `rerank`."""
        documents = _as_list(documents, "arerank")
        scoring = self._scoring(
            activation, documents=documents, top_k=top_k, return_documents=return_documents
        )
        job = self._rerank_job(query, len(documents), truncate)
        return cast("np.ndarray", await aio.run(self._scheduler, job, documents, scoring))

    async def arerank_pairs(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        activation: Activation = "none",
        truncate: Truncate = False,
    ) -> np.ndarray:
        """Await how well the document of each pair answers its query; see `rerank_pairs`."""
        scoring = self._scoring(activation)
        wanted = self._pairs(_as_list(pairs, "arerank_pairs"), truncate)
        job = self._pairs_job(len(wanted))
        return cast("np.ndarray", await aio.run(self._scheduler, job, wanted, scoring))

    # ------------------------------------------------------------------------------- the rest

    def stats(self) -> dict[str, Any]:
        """Return what the scheduler has done so far.

        Returns
        -------
        dict
            ``queued_texts`` and ``queued_tokens`` now; ``tokenize_seconds`` of all callers
            together; ``workers``, a dict for each context: ``packs``, ``texts``, ``tokens``, and
            the seconds spent in ``wait_seconds``, ``decode_seconds`` and ``copy_seconds``.
        """
        return self._scheduler.stats()

    def recent_packs(self) -> np.ndarray:
        """Return the last packs, up to 4096, a structured array in the order in which they ended.

        Returns
        -------
        ndarray, shape (n_packs,)
            Fields ``worker`` (which context), ``n_texts``, ``n_tokens``, ``seconds`` (from taking
            the pack to its last row), of them ``decode_seconds`` and ``copy_seconds``,
            ``wait_seconds`` (of the worker, before it), ``queued_tokens`` (left behind it).
        """
        return self._scheduler.recent_packs()

    def _tune(self, n_done: int, *, over: bool = False) -> None:
        """Let a job that goes on for long find the best size of a pack on its way."""
        calibration = self._calibration
        if calibration is None:
            return
        if over:
            self._scheduler.pack_tokens = self.layout.pack_tokens
        elif n_done >= CALIBRATION_TEXTS and (found := calibration.step()):
            self._calibration = None
            self.layouts = [replace(self.layout, pack_tokens=found)]
            tuning.remember(self.model, self._on_gpu, self.layout)

    def _plan(self, how: EmbedOptions) -> Plan:
        """Return how to do what the options say; callers of single texts ask again and again."""
        if self.pooling_type == PoolingType.RANK:
            raise PoolingError("this model is a reranker (pooling RANK): use rerank()")
        plan = self._plans.get(how.key)
        if plan is None or plan.how.ranges is not how.ranges:
            plan = Plan(how, self.model, self.pooling_type, self._limit, self.prompts)
            if len(self._plans) < PLANS_MAX:
                self._plans[how.key] = plan
        return plan

    def _with_prompt(self, name: str, how: EmbedOptions) -> EmbedOptions:
        if name not in self.prompts or how.prompt is not None or how.prompt_name is not None:
            return how
        return replace(how, prompt_name=name)

    def _job(self, work: Prepared, *, dedup: bool = True) -> Job:
        plan = work.plan
        return self._scheduler.job(
            plan.encoder, len(work.units), norm=plan.norm, width=plan.width, dedup=dedup
        )

    def _embed(self, plan: Plan, texts: list[Any], *, dedup: bool = True, **keywords: Any) -> Any:
        """Return the vectors of texts."""
        work = plan.prepare(texts)
        try:
            return work.finish(self._run(self._job(work, dedup=dedup), work.units, **keywords))
        except LlamaError as error:
            work.restate(error)
            raise

    def _scoring(self, activation: Activation, **wanted: Any) -> Scoring:
        if self.pooling_type != PoolingType.RANK:
            raise PoolingError(
                "this model is used as an embedder"
                + (
                    ": make it with pooling_type=PoolingType.RANK to rerank"
                    if self.model.has_rank_head
                    else " and has no classification head: reranking needs a reranker's GGUF"
                )
            )
        return Scoring(self.model, activation, **wanted)

    def _rerank_job(self, query: str, n_documents: int, truncate: Truncate) -> Job:
        encoder = PairTemplate(self.model, query).encoder(limit=self._limit, truncate=truncate)
        return self._scheduler.job(encoder, n_documents)

    def _pairs(self, pairs: list[Any], truncate: Truncate) -> Pairs:
        return Pairs(self.model, pairs, limit=self._limit, truncate=truncate)

    def _pairs_job(self, n_pairs: int) -> Job:
        return self._scheduler.job(Encoder(self.model.vocab, limit=self._limit), n_pairs)

    def _run(
        self,
        job: Job,
        texts: list[Any] | Pairs,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Any:
        """Put the texts through the scheduler and return their rows."""
        deadline = None if timeout is None else time.monotonic() + timeout
        bar = require("tqdm", extra="progress").tqdm(total=len(texts)) if progress else None
        try:
            for start in range(0, len(texts), TEXTS_A_STEP):
                job.add(texts[start : start + TEXTS_A_STEP], deadline=deadline)
                if bar is not None:
                    bar.update(job.n_done - bar.n)
                self._tune(job.n_done)
            job.seal()
            self._tune(job.n_done, over=True)
            return job.wait(
                deadline=deadline,
                progress=None if bar is None else lambda done: bar.update(done - bar.n),
            )
        except BaseException as error:
            # Until this returns, workers may still write rows.
            job.cancel()
            if isinstance(error, LlamaError) and not isinstance(error, ClosedError):
                error.rows, error.done = job.rows, job.done
            raise
        finally:
            if bar is not None:
                bar.close()


def _as_list(texts: Iterable[Any], name: str) -> list[Any]:
    if isinstance(texts, (str, bytes)):
        raise InputError(f"{name} takes a list of texts, not one text")
    return texts if isinstance(texts, list) else list(texts)
