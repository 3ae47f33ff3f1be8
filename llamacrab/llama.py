"""`Llama`: the public interface."""

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
from llamacrab._diagnostics import log_context_warnings, log_missing_gpu, log_other_kernels
from llamacrab._engine import Engine
from llamacrab.errors import ClosedError, DeviceError, InputError, PoolingError
from llamacrab.models.default import resolve
from llamacrab.options import EmbedKeywords, EmbedOptions, merge
from llamacrab.requests.answers import RankHead, answer_head
from llamacrab.requests.embedding import EmbedPipeline, EmbedRequest
from llamacrab.requests.pair_template import Pairs, PairTemplate, common_ids, pair_format
from llamacrab.requests.prompts import prompts_of
from llamacrab.requests.reranking import RerankRequest, Scoring, warn_about_scores
from llamacrab.requests.texts import as_iterator, as_list, as_pairs, is_one
from llamacrab.tuning import Layout

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from typing import TypeAlias

    from typing_extensions import Self, Unpack

    from llamacrab._core import Model
    from llamacrab.options import Truncate
    from llamacrab.requests.answers import AnswerHead
    from llamacrab.requests.reranking import Activation, RerankResult

    Text: TypeAlias = str | Sequence[int] | np.ndarray

_logger = logging.getLogger("llamacrab")

# Number of pipelines that are kept, one per set of options.
PIPELINES_MAX = 64


@dataclass(frozen=True)
class TokenEmbeddings:
    """The embeddings of a text's tokens.

    Attributes
    ----------
    ids : ndarray of int32, shape (n_tokens,)
        The tokens, special ones included.
    offsets : ndarray of int32, shape (n_tokens, 2)
        Where in the text each token comes from: ``text[start:stop]``; (0, 0) for special tokens.
    vectors : ndarray, shape (n_tokens, n_embd)
        One embedding per token.
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
        Texts that can be computed together, at most 256; 0: one per 4 tokens of a pack.
    pack_tokens : int
        Target size of a pack; 0: the size that was measured to be fastest, or a guess. It changes
        how fast embeddings are computed, not their values.
    n_contexts : int
        Packs computed at the same time, each by its own context and native thread; 0: the
        measured number, or as many as there are CPUs for `n_threads` each.
    n_threads : int
        Threads that compute a pack; 0: the measured number, or the CPUs that the process may use,
        divided by the number of contexts.
    n_cpus : int
        CPUs that all contexts together may use; 0: all that the process may use. With it alone,
        ``Llama(n_cpus=1)`` keeps one CPU busy, and no more.
    n_gpu_layers : int
        Layers to put on GPUs, if this build has any; -1: all.
    main_gpu : int
        The GPU that takes the whole model under ``SplitMode.NONE``.
    split_mode : SplitMode
        How several GPUs share the model.
    devices : sequence of str, optional
        Put a copy of the model on each of these devices, instead of one model that all GPUs share.
        ``llamacrab info --devices`` shows their names. All copies take packs from one queue, and
        should be equally fast. `n_contexts` and `n_threads` are per copy.
    pooling_type : PoolingType or str
        How the rows of a text's tokens become its embedding, also by name, such as ``"mean"``;
        UNSPECIFIED: as the GGUF says, else RANK for a known reranker, else MEAN.
    answers : str or sequence of str, optional
        Rerank with a causal model that has no rank head, by the logits of these tokens: the answer
        that counts, such as ``"Yes"``, or that answer and its opposite, such as ``("yes", "no")``.
        Implies ``pooling_type="rank"``. Models of known families need no answers: see
        docs/rerank.md.
    template : str, optional
        Format of a reranker's pairs, with ``{query}``, ``{document}`` and, if each call passes one,
        ``{instruction}``. By default that of the GGUF, or that of the model's family.
    flash_attn : bool or "auto"
        Flash attention.
    use_mmap, use_mlock : bool
        Map the file instead of reading it; keep it from being swapped out.
    cpu_backend : {"auto", "llamacrab", "ggml", "int8"}
        Kernels on the CPU: llamacrab's, ggml's, or llamacrab's with products in 8 bits ("int8").
        "auto": the value of the environment variable ``LLAMACRAB_CPU_BACKEND``, else the faster of
        "llamacrab" and "ggml". See docs/kernels.md.
    queue_tokens : int
        Size of the queue in tokens: when it is full, further calls wait; 0: 32 packs per context.
    deterministic : bool
        Compute every text alone, so that its embedding is the same to the last bit, whatever else
        is in the queue. Slower: see docs/threads.md.
    on_pack : callable, optional
        Called after every pack, on a separate thread, with a dict of the fields of `recent_packs`.
        If it falls more than 4096 packs behind, it misses some.

    Attributes
    ----------
    model : Model
        The weights, and the vocabulary as ``model.vocab``.
    prompts : dict of str to str
        The model's own prompts by name; empty where none are known.
    layouts : list of llamacrab.tuning.Layout
        One per device.
    layout : llamacrab.tuning.Layout
        Contexts, threads per context, and tokens per pack.
    layout_sources : dict of str to str
        Where each number of `layout` comes from.
    backends : list of str
        Where the model runs: ``"ggml"``, a kernel set such as ``"llamacrab avx2"``, or a kind of
        GPU such as ``"CUDA"``; several if the copies on `devices` differ.
    deterministic : bool
        The value of the parameter.

    Raises
    ------
    ModelError, ContextError, PoolingError, AllocationError
        The model or the sizes cannot be used; see `llamacrab.errors`.
    InputError
        An answer is not one token of the model, or `template` lacks a placeholder or is missing.

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
        n_cpus: int = 0,
        n_gpu_layers: int = -1,
        main_gpu: int = 0,
        split_mode: SplitMode = SplitMode.LAYER,
        devices: Sequence[str] | None = None,
        pooling_type: PoolingType | str = PoolingType.UNSPECIFIED,
        answers: str | Sequence[str] | None = None,
        template: str | None = None,
        flash_attn: bool | str = "auto",
        use_mmap: bool = True,
        use_mlock: bool = False,
        cpu_backend: Literal["auto", "llamacrab", "ggml", "int8"] = "auto",
        queue_tokens: int = 0,
        deterministic: bool = False,
        on_pack: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        # The arguments from which pickle makes it again.
        self._given = {
            name: value for name, value in locals().items() if name not in ("self", "path")
        }
        self._path = None if path is None else Path(path).absolute()
        if isinstance(devices, str) or (devices is not None and not devices):
            raise DeviceError(f"devices must be a list of names, such as ['CPU'], not {devices!r}")
        self._head: AnswerHead | RankHead | None = None

        def choose_pooling(model: Model) -> PoolingType:
            wanted = PoolingType(cast("int", pooling_type))  # also by name
            self._head = answer_head(model, wanted, answers)
            self._pair_format = pair_format(model, template, has_answers=self._head is not None)
            pooling = model.pooling_type if wanted == PoolingType.UNSPECIFIED else wanted
            if self._head is None and pooling == PoolingType.RANK and RankHead.is_for(model):
                self._head = RankHead(model)
            if self._head is not None:
                return PoolingType.LAST  # scores are made of the last token's row
            if template is not None and pooling != PoolingType.RANK:
                raise InputError("template= is for rerankers: pass pooling_type='rank' too")
            return wanted

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
            n_cpus=n_cpus,
            choose_pooling=choose_pooling,
            scheduler_params={
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
        log_other_kernels()
        log_context_warnings(self.model, self.pooling_type, self._engine.n_ctx_wanted)
        if self.pooling_type == PoolingType.RANK:
            warn_about_scores(self.model)
        _logger.info(
            "%s: %s, cpu_backend=%s, %s",
            repr(self),  # not later: the model may be closed before the record is formatted
            self.model.desc,
            self.model.cpu_backend,
            ", ".join(map(str, self.layouts)),
        )

    @property
    def layouts(self) -> list[Layout]:
        """The layout on each of the devices."""
        return self._engine.layouts

    @property
    def layout(self) -> Layout:
        """The layout on the first device; `layouts` has all."""
        return self._engine.layouts[0]

    @property
    def layout_sources(self) -> dict[str, str]:
        """Where each field of `layout` comes from: "given", "measured on ..." or "guess"."""
        return dict(self._engine.layout_sources[0])

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
        """Pickle the path and the arguments: the process that unpickles them loads the model."""
        if self.model.closed:
            raise ClosedError("the Llama is closed: pickle it before closing it, or pass its path")
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
        """Return itself: copies share one model."""
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
        """How the rows of a text's tokens become its embedding; RANK for every reranker."""
        if self._head is not None:
            return PoolingType.RANK
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
        """Return the embedding of one text.

        Parameters
        ----------
        text : str or sequence of int
            A text, or token ids, to which no special token is added.
        options : EmbedOptions, optional
            Options of the embeddings; by default ``EmbedOptions()``.
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.
        **changes
            Fields of `EmbedOptions`, such as ``normalize=False`` or ``truncate=True``. They
            override those of `options`.

        Returns
        -------
        ndarray of float32, shape (n_embd,)
            Another dtype or width if the options ask for it. With ``PoolingType.NONE`` one row per
            token: shape (n_tokens, n_embd).

        Raises
        ------
        InputError
            The text is too long (`TextTooLongError`), has no tokens, or has a wrong type; or an
            option does not fit this model.
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
        """Return the embeddings of several texts, in the order of the texts.

        Parameters
        ----------
        texts : iterable of str or of sequences of int
            Texts, or token ids, to which no special token is added: a list, a flat array of
            numpy or Arrow, a Series, a generator. See docs/embed.md for what is refused.
        options : EmbedOptions, optional
            Options of the embeddings; by default ``EmbedOptions()``.
        dedup : bool
            Compute equal texts that are in the queue at the same time once.
        progress : bool
            Show a progress bar (extra ``progress``).
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.
        **changes
            Fields of `EmbedOptions` that override those of `options`.

        Returns
        -------
        ndarray of float32, shape (n_texts, n_embd)
            Another dtype or width if the options ask for it. With ``PoolingType.NONE`` a list of
            arrays, each of shape (n_tokens, n_embd).

        Raises
        ------
        InputError
            A text is too long, has no tokens, is missing, or has a wrong type; ``index`` is its
            number. Or `texts` does not hold texts, or an option does not fit this model.
        PoolingError
            The model is a reranker.
        DecodeError, NumericalError, AllocationError, LlamaTimeoutError, ClosedError
            The computation failed after some texts were computed.

        Notes
        -----
        Texts are tokenized while earlier ones are computed, so an exception may come late. Results
        are not lost: a `LlamaError` has ``rows``, the embeddings that this call would have
        returned, and ``done``, a bool per text: whether its embedding was computed.
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
        """Return the embedding of a search query: `embed` with the model's prompt for queries.

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
        """Return the embeddings of documents: `embed_texts` with the model's prompt for documents.

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
        """Return the embeddings of a text's tokens, and where in the text each token comes from.

        Parameters
        ----------
        text : str or sequence of int
            A text, or token ids. For token ids there is no text, so all offsets are (0, 0).
        options : EmbedOptions, optional
            Options of the embeddings; by default ``EmbedOptions()``.
        **changes
            Fields of `EmbedOptions` that override those of `options`.

        Raises
        ------
        PoolingError
            The `Llama` was not made with ``pooling_type=PoolingType.NONE``.
        """
        if self.pooling_type != PoolingType.NONE:
            raise PoolingError(
                f"this Llama pools ({self.pooling_type.name}): make one with "
                "pooling_type=PoolingType.NONE for the embeddings of tokens"
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
        """Yield the embeddings of a stream of texts, in order, in bounded memory.

        At most four blocks of `batch_size` texts are in memory: the one that is yielded, and those
        that are being read and computed at the same time.

        Parameters
        ----------
        texts : iterable of str or of sequences of int
            The texts. A generator is read as embeddings are taken.
        options, dedup, **changes
            As for `embed_texts`.
        batch_size : int
            Texts per block.

        Yields
        ------
        ndarray of float32, shape (batch_size, n_embd)
            The last one may be shorter. With ``PoolingType.NONE`` a list of arrays.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        # Wrong options raise here, not at the first block.
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
        """Queue one text or a list of texts, and return at once a future of their embeddings.

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
            Its ``cancel()`` works until the embeddings are computed: texts that wait are dropped,
            and a pack that holds no text of another call is stopped.

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
        """Await the embedding of one text; see `embed`."""
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
        """Await the embeddings of several texts; see `embed_texts`.

        Cancelling the task drops the texts that wait. Other calls are not affected.
        """
        pipeline = self._pipeline(merge(options, changes))
        request = EmbedRequest(pipeline, as_list(texts, "aembed_texts"), dedup=dedup)
        return cast("np.ndarray", await self._engine.arun(request))

    async def aembed_query(
        self, text: Text, *, options: EmbedOptions | None = None, **changes: Unpack[EmbedKeywords]
    ) -> np.ndarray:
        """Await the embedding of a search query; see `embed_query`."""
        return await self.aembed(text, options=self._with_prompt("query", merge(options, changes)))

    async def aembed_documents(
        self,
        texts: Iterable[Text],
        *,
        options: EmbedOptions | None = None,
        dedup: bool = True,
        **changes: Unpack[EmbedKeywords],
    ) -> np.ndarray:
        """Await the embeddings of documents; see `embed_documents`."""
        texts = as_list(texts, "aembed_documents")
        options = self._with_prompt("document", merge(options, changes))
        return await self.aembed_texts(texts, options=options, dedup=dedup)

    # ------------------------------------------------------------------------------- reranking

    @property
    def labels(self) -> list[str]:
        """Names of the classes of a reranker's head, if the GGUF has them."""
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
        instruction: str | None = None,
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
        instruction: str | None = None,
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
        instruction: str | None = None,
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
        instruction: str | None = None,
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> np.ndarray | list[RerankResult]:
        """Return how well each document answers the query, by the model's head or its answers.

        Parameters
        ----------
        query : str
            The query.
        documents : iterable of str
            The documents.
        top_k : int, optional
            Return only the `top_k` best documents, sorted.
        activation : {"none", "sigmoid", "softmax"}
            Applied to the outputs of the head: the logistic function to each, or the softmax over
            the classes of a head with several classes. Neither changes the scores of Qwen3
            rerankers, which are probabilities already. Scores by answers are raw logits otherwise;
            of the difference of two, the logistic function is the probability of the first.
        return_documents : bool
            Return sorted results that hold the documents themselves.
        instruction : str, optional
            The task, for models that were trained to read one (Qwen3-Reranker, mxbai-rerank-v2) and
            for a `template` with ``{instruction}``.
        truncate : bool or {"end", "start", "middle"}
            Which part of a document to cut away if the pair is too long, instead of raising; True
            is the end. Only the document is cut.
        timeout : float, optional
            Seconds after which to give up with `LlamaTimeoutError`.

        Returns
        -------
        ndarray of float32, shape (n_documents,)
            Scores in the order of the documents, higher is better. They are the head's raw outputs,
            or the logit of the model's answer, minus that of the opposite answer if there is one.
            Qwen3 rerankers give the probability of "yes".
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
            An argument is wrong, or does not fit this model: the softmax over one output, sorted
            documents with several classes, or an instruction for a model that takes none.
        """
        documents = as_list(documents, "rerank")
        request = self._rerank_request(
            query, documents, instruction, truncate, activation, top_k, return_documents
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
        instruction: str | None = None,
        truncate: Truncate = False,
        block: bool = True,
    ) -> Future[Any]:
        """Queue a query with its documents, and return at once a future of what `rerank` returns.

        Parameters
        ----------
        query, documents, top_k, activation, return_documents, instruction, truncate
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
            query, documents, instruction, truncate, activation, top_k, return_documents
        )
        return self._engine.submit(request, block=block)

    def rerank_pairs(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        activation: Activation = "none",
        instruction: str | None = None,
        truncate: Truncate = False,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Return how well the document of each pair answers the query of the pair.

        Pairs of all queries share packs, which is faster than one call of `rerank` per query.

        Parameters
        ----------
        pairs : iterable of (str, str)
            Query and document of each pair.
        activation, instruction, truncate, timeout
            As for `rerank`.

        Returns
        -------
        ndarray of float32, shape (n_pairs,)
            Scores in the order of the pairs; with several classes shape (n_pairs, n_cls_out).
        """
        request = self._pairs_request(
            as_pairs(pairs, "rerank_pairs"), instruction, activation, truncate
        )
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
        instruction: str | None = None,
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
        instruction: str | None = None,
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
        instruction: str | None = None,
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
        instruction: str | None = None,
        truncate: Truncate = False,
    ) -> np.ndarray | list[RerankResult]:
        """Await how well each document answers the query; see `rerank`."""
        documents = as_list(documents, "arerank")
        request = self._rerank_request(
            query, documents, instruction, truncate, activation, top_k, return_documents
        )
        return cast("np.ndarray", await self._engine.arun(request))

    async def arerank_pairs(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        activation: Activation = "none",
        instruction: str | None = None,
        truncate: Truncate = False,
    ) -> np.ndarray:
        """Await how well the document of each pair answers its query; see `rerank_pairs`."""
        request = self._pairs_request(
            as_pairs(pairs, "arerank_pairs"), instruction, activation, truncate
        )
        return cast("np.ndarray", await self._engine.arun(request))

    # ------------------------------------------------------------------------------- statistics

    def stats(self) -> dict[str, Any]:
        """Return what the scheduler has done so far.

        Returns
        -------
        dict
            ``queued_texts`` and ``queued_tokens`` now; ``tokenize_seconds``, the sum over all
            calls; ``workers``, one dict per context: ``packs``, ``texts``, ``tokens``, and the
            times ``wait_seconds``, ``decode_seconds`` and ``copy_seconds``.
        """
        return self._engine.scheduler.stats()

    def recent_packs(self) -> np.ndarray:
        """Return the last packs, at most 4096, as a structured array in the order of their ends.

        Returns
        -------
        ndarray, shape (n_packs,)
            Fields ``worker`` (which context), ``n_texts``, ``n_tokens``, ``n_threads`` (its
            context's, and those that idle workers lent), ``seconds`` (from taking the pack to its
            last row), its parts ``decode_seconds`` and ``copy_seconds``, ``wait_seconds`` (of the
            worker, before the pack), ``queued_tokens`` (in the queue after the pack was taken).
        """
        return self._engine.scheduler.recent_packs()

    def _pipeline(self, options: EmbedOptions) -> EmbedPipeline:
        """Return the pipeline for these options; pipelines are kept for calls with single texts."""
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

    def _scoring(self, activation: Activation, **scoring_kwargs: Any) -> Scoring:
        if self.pooling_type != PoolingType.RANK:
            raise PoolingError(
                "this model is used as an embedder"
                + (
                    ": make it with pooling_type=PoolingType.RANK to rerank"
                    if self.model.has_rank_head
                    else " and has no classification head: reranking needs a reranker's GGUF, or "
                    "answers= for a causal model that answers with a token"
                )
            )
        return Scoring(self.model, activation, head=self._head, **scoring_kwargs)

    def _rerank_request(
        self,
        query: str,
        documents: list[str],
        instruction: str | None,
        truncate: Truncate,
        activation: Activation,
        top_k: int | None,
        return_documents: bool,
    ) -> RerankRequest:
        scoring = self._scoring(
            activation, documents=documents, top_k=top_k, return_documents=return_documents
        )
        template = PairTemplate(self.model, query, self._pair_format, instruction)
        tokenization = template.tokenization(
            limit=self.n_ctx, truncate=truncate, larger=self._engine.larger
        )
        return RerankRequest(tokenization, documents, scoring)

    def _pairs_request(
        self,
        pairs: list[Any],
        instruction: str | None,
        activation: Activation,
        truncate: Truncate,
    ) -> RerankRequest:
        scoring = self._scoring(activation)
        common = common_ids(self.model, self._pair_format, instruction)
        return RerankRequest(
            # Its input are ids. Only the scheduler uses the prefix, for what the pairs share.
            Tokenization(self.model.vocab, limit=self.n_ctx, prefix_ids=common),
            Pairs(
                self.model,
                pairs,
                self._pair_format,
                instruction,
                limit=self.n_ctx,
                truncate=truncate,
                larger=self._engine.larger,
            ),
            scoring,
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
