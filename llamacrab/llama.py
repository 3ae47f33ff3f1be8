"""`Llama`: what people import."""

from __future__ import annotations

import functools
import itertools
import logging
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np

from llamacrab._core import PoolingType, Scheduler, SplitMode, Tokenization
from llamacrab._diagnostics import log_context_warnings, log_missing_gpu
from llamacrab._engine import Engine
from llamacrab.errors import ClosedError, DeviceError, InputError, PoolingError
from llamacrab.models.default import resolve
from llamacrab.options import EmbedKeywords, EmbedOptions, merge
from llamacrab.requests.embedding import EmbedPipeline, EmbedRequest
from llamacrab.requests.pair_template import Pairs, PairTemplate
from llamacrab.requests.prompts import prompts_of
from llamacrab.requests.reranking import RerankRequest, Scoring, warn_of_wrong_scores
from llamacrab.requests.texts import as_iterator, as_list, as_pairs, is_one
from llamacrab.tuning import Layout

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from typing import TypeAlias

    from typing_extensions import Self, Unpack

    from llamacrab.options import Truncate
    from llamacrab.requests.reranking import Activation, RerankResult

    Text: TypeAlias = str | Sequence[int] | np.ndarray

_logger = logging.getLogger("llamacrab")

# Pipelines that are kept, one for every set of options in use.
PIPELINES_MAX = 64


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
    pooling_type : PoolingType or str
        How rows of tokens become the row of a text, or its name, such as ``"mean"``; UNSPECIFIED:
        what the GGUF says, else MEAN.
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
        pooling_type: PoolingType | str = PoolingType.UNSPECIFIED,
        flash_attn: bool | str = "auto",
        use_mmap: bool = True,
        use_mlock: bool = False,
        cpu_backend: Literal["auto", "llamacrab", "ggml", "int8"] = "auto",
        queue_tokens: int = 0,
        deterministic: bool = False,
        on_pack: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        # What pickle makes it of again.
        self._given = {
            name: value for name, value in locals().items() if name not in ("self", "path")
        }
        self._path = None if path is None else Path(path).absolute()
        if isinstance(devices, str) or (devices is not None and not devices):
            raise DeviceError(f"devices must be a list of names, such as ['CPU'], not {devices!r}")
        self._engine = Engine(
            resolve(path),
            devices=devices,
            n_gpu_layers=n_gpu_layers,
            model_params={
                "main_gpu": main_gpu,
                "split_mode": split_mode,
                "use_mmap": use_mmap,
                "use_mlock": use_mlock,
                "cpu_backend": cpu_backend,
            },
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            given=Layout(n_contexts, n_threads, pack_tokens or n_ubatch, flash_attn),
            scheduler_params={
                "pooling_type": pooling_type,
                "queue_tokens": queue_tokens,
                "deterministic": deterministic,
                "on_pack": on_pack,
            },
        )
        self.model = self._engine.models[0]
        self.backends = self._engine.backends
        self.deterministic = deterministic
        self.prompts = prompts_of(self.model.metadata)
        self._pipelines: dict[str, EmbedPipeline] = {}
        if devices is None and n_gpu_layers != 0:
            log_missing_gpu()
        log_context_warnings(self.model, self.pooling_type, self._engine.n_ctx_wanted)
        if self.pooling_type == PoolingType.RANK:
            warn_of_wrong_scores(self.model)
        _logger.info(
            "%s: %s, cpu_backend=%s, %s",
            repr(self),  # now: a record may be formatted when it is closed
            self.model.desc,
            self.model.cpu_backend,
            ", ".join(map(str, self.layouts)),
        )

    @property
    def layouts(self) -> list[Layout]:
        """How the model is computed on each of its devices."""
        return self._engine.layouts

    @property
    def layout(self) -> Layout:
        """How the model is computed, on the first of its devices; `layouts` has all."""
        return self._engine.layouts[0]

    @property
    def _scheduler(self) -> Scheduler:
        return self._engine.scheduler

    def close(self) -> None:
        """Stop all work at once and free the model; calls that are running raise `ClosedError`."""
        self._engine.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle its file and arguments: the process that unpickles it loads the model itself."""
        if self.model.closed:
            raise ClosedError("the Llama is closed: pickle it before, or pass its path")
        on_pack = self._given["on_pack"]
        try:
            pickle.dumps(on_pack)
        except Exception as error:
            raise InputError(
                f"this Llama cannot be pickled, as on_pack={on_pack!r} cannot be "
                f"({error}): use a function of a module, or make the Llama in the other process"
            ) from error
        return functools.partial(type(self), **self._given), (self._path,)

    def __copy__(self) -> Self:
        """Return itself: one model serves all who use it."""
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

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
        return self._engine.n_ctx

    @property
    def pooling_type(self) -> PoolingType:
        """How rows of tokens become the row of a text."""
        return self._engine.scheduler.context.pooling_type

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
        request = EmbedRequest(self._pipeline(merge(options, changes)), [text], single=True)
        return cast("np.ndarray", self._engine.run(request, timeout=timeout))

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
            Texts, or token ids, to which no special token is added: a list, a flat array of
            numpy or Arrow, a Series, a generator. See docs/embed.md for what is refused.
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
            A text is too long, has no tokens, is missing, or is of a wrong type; ``index`` tells
            which. Or `texts` holds no texts, or an option makes no sense for this model.
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
        pipeline = self._pipeline(merge(options, changes))
        request = EmbedRequest(pipeline, as_list(texts, "embed_texts"), dedup=dedup)
        return cast("np.ndarray", self._engine.run(request, timeout=timeout, progress=progress))

    def embed_query(
        self,
        text: Text,
        *,
        options: EmbedOptions | None = None,
        timeout: float | None = None,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Return the vector of a search query: `embed` with the model's prompt for queries.

        A model whose prompts are not known (`prompts`) gets none.
        """
        options = self._with_prompt("query", merge(options, changes))
        return self.embed(text, options=options, timeout=timeout)

    def embed_documents(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        progress: bool = False,
        timeout: float | None = None,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Return the vectors of documents: `embed_texts` with the model's prompt for documents.

        A model whose prompts are not known (`prompts`) gets none.
        """
        texts = as_list(texts, "embed_documents")
        options = self._with_prompt("document", merge(options, changes))
        return self.embed_texts(
            texts, options=options, dedup=dedup, progress=progress, timeout=timeout
        )

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
        pipeline = self._pipeline(merge(options, changes))
        ids = pipeline.tokenization.tokenize(text)
        unprompted = self._pipeline(replace(pipeline.options, prompt=None, prompt_name=None))
        vectors = self._engine.run(EmbedRequest(unprompted, [ids], single=True))
        return TokenEmbeddings(ids, pipeline.offsets(text, ids), vectors)

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
        # What cannot work fails here, not at the first block.
        pipeline = self._pipeline(merge(options, changes))
        stream = as_iterator(texts, "embed_iter")
        return self._engine.stream(_requests(pipeline, stream, batch_size, dedup=dedup))

    def submit(
        self,
        texts: Text | Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        block: bool = True,
        **changes: Unpack[EmbedKeywords],
    ) -> Future[np.ndarray]:
        """Queue one text or a list of texts and return at once a future of their vectors.

        Parameters
        ----------
        texts : str, sequence of int, or iterable of them
            One text gives what `embed` returns, several what `embed_texts` returns.
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
        single = is_one(texts, "submit")
        batch = [texts] if single else as_list(texts, "submit")
        pipeline = self._pipeline(merge(options, changes))
        request = EmbedRequest(pipeline, batch, single=single, dedup=dedup)
        return self._engine.submit(request, block=block)

    async def aembed(
        self, text: Text, *, options: EmbedOptions | None = None, **changes: Unpack[EmbedKeywords]
    ) -> np.ndarray:
        """Await the vector of one text; see `embed`."""
        request = EmbedRequest(self._pipeline(merge(options, changes)), [text], single=True)
        return cast("np.ndarray", await self._engine.arun(request))

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
        pipeline = self._pipeline(merge(options, changes))
        request = EmbedRequest(pipeline, as_list(texts, "aembed_texts"), dedup=dedup)
        return cast("np.ndarray", await self._engine.arun(request))

    async def aembed_query(
        self, text: Text, *, options: EmbedOptions | None = None, **changes: Unpack[EmbedKeywords]
    ) -> np.ndarray:
        """Await the vector of a search query; see `embed_query`."""
        return await self.aembed(text, options=self._with_prompt("query", merge(options, changes)))

    async def aembed_documents(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Await the vectors of documents; see `embed_documents`."""
        texts = as_list(texts, "aembed_documents")
        options = self._with_prompt("document", merge(options, changes))
        return await self.aembed_texts(texts, options=options, dedup=dedup)

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
        documents = as_list(documents, "rerank")
        request = self._rerank_request(
            query, documents, truncate, activation, top_k, return_documents
        )
        return cast("np.ndarray", self._engine.run(request, timeout=timeout))

    def submit_rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        activation: Activation = "none",
        return_documents: bool = False,
        truncate: Truncate = False,
        block: bool = True,
    ) -> Future[Any]:
        """Queue a query with its documents, and return at once a future of what `rerank` returns.

        Parameters
        ----------
        query, documents, top_k, activation, return_documents, truncate
            As for `rerank`.
        block : bool
            Wait while the queue is full; else raise `QueueFull`.

        Returns
        -------
        concurrent.futures.Future
            Cancelling it works as for `submit`.
        """
        documents = as_list(documents, "submit_rerank")
        request = self._rerank_request(
            query, documents, truncate, activation, top_k, return_documents
        )
        return self._engine.submit(request, block=block)

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
        request = self._pairs_request(as_pairs(pairs, "rerank_pairs"), activation, truncate)
        return cast("np.ndarray", self._engine.run(request, timeout=timeout))

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
        documents = as_list(documents, "arerank")
        request = self._rerank_request(
            query, documents, truncate, activation, top_k, return_documents
        )
        return cast("np.ndarray", await self._engine.arun(request))

    async def arerank_pairs(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        activation: Activation = "none",
        truncate: Truncate = False,
    ) -> np.ndarray:
        """Await how well the document of each pair answers its query; see `rerank_pairs`."""
        request = self._pairs_request(as_pairs(pairs, "arerank_pairs"), activation, truncate)
        return cast("np.ndarray", await self._engine.arun(request))

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
        return self._engine.scheduler.stats()

    def recent_packs(self) -> np.ndarray:
        """Return the last packs, up to 4096, a structured array in the order in which they ended.

        Returns
        -------
        ndarray, shape (n_packs,)
            Fields ``worker`` (which context), ``n_texts``, ``n_tokens``, ``seconds`` (from taking
            the pack to its last row), of them ``decode_seconds`` and ``copy_seconds``,
            ``wait_seconds`` (of the worker, before it), ``queued_tokens`` (left behind it).
        """
        return self._engine.scheduler.recent_packs()

    def _pipeline(self, options: EmbedOptions) -> EmbedPipeline:
        """Return how to do what the options say; callers of single texts ask again and again."""
        if self.pooling_type == PoolingType.RANK:
            raise PoolingError("this model is a reranker (pooling RANK): use rerank()")
        pipeline = self._pipelines.get(options.key)
        if pipeline is None or pipeline.options.ranges is not options.ranges:
            pipeline = EmbedPipeline(
                options,
                self.model,
                self.pooling_type,
                self.n_ctx,
                self.prompts,
                self._engine.larger,
            )
            if len(self._pipelines) < PIPELINES_MAX:
                self._pipelines[options.key] = pipeline
        return pipeline

    def _with_prompt(self, name: str, options: EmbedOptions) -> EmbedOptions:
        given = options.prompt is not None or options.prompt_name is not None
        return options if given or name not in self.prompts else replace(options, prompt_name=name)

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

    def _rerank_request(
        self,
        query: str,
        documents: list[str],
        truncate: Truncate,
        activation: Activation,
        top_k: int | None,
        return_documents: bool,
    ) -> RerankRequest:
        scoring = self._scoring(
            activation, documents=documents, top_k=top_k, return_documents=return_documents
        )
        template = PairTemplate(self.model, query)
        tokenization = template.tokenization(
            limit=self.n_ctx, truncate=truncate, larger=self._engine.larger
        )
        return RerankRequest(tokenization, documents, scoring)

    def _pairs_request(
        self, pairs: list[Any], activation: Activation, truncate: Truncate
    ) -> RerankRequest:
        return RerankRequest(
            Tokenization(self.model.vocab, limit=self.n_ctx),
            Pairs(
                self.model,
                pairs,
                limit=self.n_ctx,
                truncate=truncate,
                larger=self._engine.larger,
            ),
            self._scoring(activation),
        )


def _requests(
    pipeline: EmbedPipeline, texts: Iterator[Text], batch_size: int, *, dedup: bool
) -> Iterator[EmbedRequest]:
    """Yield a request per block of a stream."""
    for first in itertools.count(0, batch_size):
        block = list(itertools.islice(texts, batch_size))
        if not block:
            return
        yield EmbedRequest(pipeline, block, dedup=dedup, first=first)
