"""From a query and a document to the token ids of their pair, and from its row to a score."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llamacrab._core import Encoder, VocabType
from llamacrab.errors import InputError, UnsupportedModelError
from llamacrab.prompts import ids_of, split_at_special

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from llamacrab._core import Model, Vocab

    Activation: TypeAlias = Literal["none", "sigmoid", "softmax"]
    Truncate: TypeAlias = bool | Literal["end", "start", "middle"]

# Queries of `rerank_pairs` whose tokens are remembered, should they come again.
QUERIES_KEPT = 4096


class PairTemplate:
    """Pairs one query with documents, in the format of llama-server's rerank endpoint.

    That is the GGUF's chat template named ``rerank`` if it has one, with ``{query}`` and
    ``{document}`` filled in, else ``[BOS] query [EOS][SEP] document [EOS]``, each special token
    only where the GGUF asks for it (llama.cpp, ``format_prompt_rerank`` in tools/server). Special
    tokens are read in the template only: one that a query or a document spells stays text.

    Parameters
    ----------
    model : Model
        The reranker.
    query : str
        The query.

    Raises
    ------
    InputError
        The query is no str.
    UnsupportedModelError
        The GGUF's template does not hold ``{document}`` exactly once.
    """

    def __init__(self, model: Model, query: str) -> None:
        if not isinstance(query, str):
            raise InputError(f"the query is {type(query).__name__}, not str")
        self._vocab = vocab = model.vocab
        template = model.chat_template("rerank")
        # A pair is: head, then the tokens of lead + document + trail, then tail. Lead and trail are
        # the text that touches the document: it must be split into tokens together with it.
        self._lead = self._trail = ""
        if template is None:
            head, tail = _around_document(vocab, query)
        elif template.count("{document}") != 1:
            raise UnsupportedModelError(
                f"the rerank template of {model.path} must hold {{document}} exactly once"
            )
        else:
            before, after = template.split("{document}")
            head = _filled(split_at_special(vocab, before), query)
            tail = _filled(split_at_special(vocab, after), query)
            self._lead, self._trail = str(head.pop()), str(tail.pop(0))
        self._head = ids_of(vocab, head)
        # The document and what closes it are BERT's segment B.
        shift = vocab.segment_b_offset or 0
        self._tail = [token + shift for token in ids_of(vocab, tail)]

    def encoder(self, *, limit: int, truncate: Truncate = False, larger: str = "") -> Encoder:
        """Return what turns a document into the token ids of its pair with the query.

        Parameters
        ----------
        limit : int
            Tokens of the longest pair.
        truncate : bool or {"end", "start", "middle"}
            Where to cut a document that is too long beside the query; never anything else.
        larger : str
            How to make `limit` larger, for error messages.
        """
        return Encoder(
            self._vocab,
            limit=limit,
            truncate=truncate,
            prefix=self._head,
            suffix=self._tail,
            lead=self._lead,
            trail=self._trail,
            shift=self._vocab.segment_b_offset or 0,
            text_only=True,
            advice="pass truncate=True to cut the document",
            larger=larger,
        )


def _around_document(vocab: Vocab, query: str) -> tuple[list[str | int], list[str | int]]:
    """Return what stands before and after the document where the GGUF has no template."""
    closing = vocab.sep if vocab.eos is None else vocab.eos
    bos = vocab.bos if vocab.add_bos else None
    eos = closing if vocab.add_eos else None
    sep = vocab.sep if vocab.add_sep else None
    head, tail = (bos, query, eos, sep), (eos,)
    return [piece for piece in head if piece is not None], [p for p in tail if p is not None]


def _filled(pieces: list[str | int], query: str) -> list[str | int]:
    """Return the pieces of a template with the query filled in, whose special tokens stay text."""
    return [
        piece if isinstance(piece, int) else piece.replace("{query}", query) for piece in pieces
    ]


class Pairs:
    """Pairs of a query and a document, which become token ids when a slice is taken.

    Parameters
    ----------
    model : Model
        The reranker.
    pairs : sequence of (str, str)
        Query and document of each.
    limit : int
        Tokens of the longest pair.
    truncate : bool or {"end", "start", "middle"}
        Where to cut a document that is too long beside its query.
    larger : str
        How to make `limit` larger, for error messages.
    """

    def __init__(
        self,
        model: Model,
        pairs: Sequence[Any],
        *,
        limit: int,
        truncate: Truncate = False,
        larger: str = "",
    ) -> None:
        self._pairs = pairs
        self._encoder_of = lru_cache(QUERIES_KEPT)(
            lambda query: PairTemplate(model, query).encoder(
                limit=limit, truncate=truncate, larger=larger
            )
        )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, wanted: slice) -> list[np.ndarray]:
        return [self._ids(i) for i in range(len(self))[wanted]]

    def _ids(self, index: int) -> np.ndarray:
        pair = self._pairs[index]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"pair {index} is no (query, document): {pair!r:.80}")
        query, document = pair
        if not isinstance(query, str):
            raise InputError(f"the query of pair {index} is {type(query).__name__}, not str")
        return self._encoder_of(query).encode(document, index)


@dataclass(frozen=True, slots=True)
class RerankResult:
    """A document and how well it answers the query.

    Attributes
    ----------
    index : int
        Its place among the documents of the call.
    score : float
        Higher is better.
    document : str or None
        The document itself, where the call asked for it.
    """

    index: int
    score: float
    document: str | None = None


class Scoring:
    """What a call makes of the rows of a rank head: scores, or the best documents.

    Parameters
    ----------
    model : Model
        The reranker.
    activation : {"none", "sigmoid", "softmax"}
        What is applied to the raw outputs.
    documents : sequence of str
        The documents.
    top_k : int, optional
        Give the best so many, sorted.
    return_documents : bool
        Give all or the best, sorted and with their text.

    Raises
    ------
    InputError
        An argument is wrong, or means nothing for this head.
    UnsupportedModelError
        The model gives every pair the same score.
    """

    def __init__(
        self,
        model: Model,
        activation: Activation = "none",
        *,
        documents: Sequence[str] = (),
        top_k: int | None = None,
        return_documents: bool = False,
    ) -> None:
        # llama.cpp's graph ends with a softmax for these (llm_graph_context::build_pooling).
        softmaxed = model.arch in ("qwen3", "qwen3vl")
        n_classes = model.n_cls_out
        if softmaxed and n_classes == 1:
            raise UnsupportedModelError(
                f"{model.path} scores every pair with 1: llama.cpp takes the softmax over the "
                "single output of its head"
            )
        if activation not in ("none", "sigmoid", "softmax"):
            raise InputError(
                f"activation must be 'none', 'sigmoid' or 'softmax', not {activation!r}"
            )
        if activation == "softmax" and n_classes == 1:
            raise InputError(
                "activation='softmax' is taken over the classes of a head, and this one has a "
                "single output: every score would be 1. Use 'sigmoid', or compare raw scores"
            )
        # What is a probability already is not squashed once more.
        self._activation = "none" if softmaxed else activation
        # Of the probabilities of yes and no, one says all.
        self._single = n_classes == 1 or (softmaxed and model.cls_labels == ["yes", "no"])
        self._documents = documents
        self._top_k = None if top_k is None else _positive(top_k)
        self._return_documents = return_documents
        self._sorted = top_k is not None or return_documents
        if self._sorted and not self._single:
            raise InputError(
                f"{n_classes} classes give no order: leave out top_k and return_documents"
            )

    def __call__(self, rows: np.ndarray) -> Any:
        """Return a score for each row, or one for each class, or sorted results."""
        if self._activation == "sigmoid":
            rows = np.exp(-np.logaddexp(0, -rows))
        elif self._activation == "softmax":
            rows = np.exp(rows - rows.max(axis=1, keepdims=True))
            rows /= rows.sum(axis=1, keepdims=True)
        scores = np.ascontiguousarray(rows[:, 0]) if self._single else rows
        if not self._sorted:
            return scores
        return [
            RerankResult(
                i, float(scores[i]), self._documents[i] if self._return_documents else None
            )
            for i in np.argsort(-scores, kind="stable")[: self._top_k].tolist()
        ]


def _positive(top_k: int) -> int:
    try:
        if (number := operator.index(top_k)) >= 1:
            return number
    except TypeError:
        pass
    raise InputError(f"top_k must be a positive integer, not {top_k!r}")


def warn_of_wrong_scores(model: Model) -> None:
    """Warn of a BERT cross-encoder in which something is missing that its scores depend on."""
    if model.arch != "bert" or model.vocab.segment_b_offset is not None:
        return
    if not model.has_pooler:
        missing = "llama.cpp's converter left out its pooler (tensor cls.weight)"
    elif (
        model.vocab.vocab_type == VocabType.WPM  # other tokenizers know no segments
        and int(model.metadata.get("tokenizer.ggml.token_type_count", "1")) > 1
    ):
        missing = "llama.cpp takes the document to be part of the query (segment A)"
    else:
        return
    warnings.warn(
        f"the scores of {model.path} are wrong: {missing}. Convert the model's Hugging Face folder "
        "with llamacrab.convert, which mends both",
        stacklevel=3,
    )
