"""Requests that rerank: from pairs of a query and a document to scores."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llamacrab._core import Tokenization, VocabType
from llamacrab.errors import InputError, UnsupportedModelError
from llamacrab.requests.answers import AnswerHead

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from llamacrab._core import Job, Model, Scheduler
    from llamacrab.errors import LlamaError
    from llamacrab.requests.answers import RankHead
    from llamacrab.requests.pair_template import Pairs

    Activation: TypeAlias = Literal["none", "sigmoid", "softmax"]


@dataclass(frozen=True, slots=True)
class RerankResult:
    """A document and how well it answers the query.

    Attributes
    ----------
    index : int
        Number of the document in the call.
    score : float
        Higher is better.
    document : str or None
        The document itself, if the call asked for it.
    """

    index: int
    score: float
    document: str | None = None


class Scoring:
    """Turns the rows of a rank head into scores, or into sorted results.

    Parameters
    ----------
    model : Model
        The reranker.
    activation : {"none", "sigmoid", "softmax"}
        The function to apply to the raw outputs.
    head : AnswerHead or RankHead, optional
        What scores the rows of the last tokens, if llama.cpp does not.
    documents : sequence of str
        The documents.
    top_k : int, optional
        Return only the `top_k` best documents, sorted.
    return_documents : bool
        Return sorted results that hold the documents.

    Raises
    ------
    InputError
        An argument is wrong, or does not fit this head.
    UnsupportedModelError
        The model gives every pair the same score.
    """

    def __init__(
        self,
        model: Model,
        activation: Activation = "none",
        *,
        head: AnswerHead | RankHead | None = None,
        documents: Sequence[str] = (),
        top_k: int | None = None,
        return_documents: bool = False,
    ) -> None:
        answers = head if isinstance(head, AnswerHead) else None
        if answers is not None:
            softmaxed, n_classes = answers.probability, 1
        else:
            # llama.cpp's graph ends with a softmax for these (llm_graph_context::build_pooling).
            softmaxed, n_classes = model.arch in ("qwen3", "qwen3vl"), model.n_cls_out
        if answers is None and softmaxed and n_classes == 1:
            raise UnsupportedModelError(
                f"{model.path} scores every pair with 1: llama.cpp takes the softmax over the "
                "single output of its head"
            )
        if activation not in ("none", "sigmoid", "softmax"):
            raise InputError(
                f"activation must be 'none', 'sigmoid' or 'softmax', not {activation!r}"
            )
        if activation == "softmax" and n_classes == 1 and not softmaxed:
            raise InputError(
                "activation='softmax' is taken over the classes of a head, and this one has a "
                "single output: every score would be 1. Use 'sigmoid', or compare raw scores"
            )
        self._head = head
        # A probability stays as it is.
        self._activation = "none" if softmaxed else activation
        # The probability of "yes" alone is enough.
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
        """Return one score per row, or one per row and class, or sorted results."""
        scores = self.scores(rows)
        if not self._sorted:
            return scores
        return [
            RerankResult(
                i, float(scores[i]), self._documents[i] if self._return_documents else None
            )
            for i in np.argsort(-scores, kind="stable")[: self._top_k].tolist()
        ]

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Return one score per row, or one per row and class, in the order of the rows."""
        if self._head is not None:
            rows = self._head(rows)
        if self._activation == "sigmoid":
            rows = np.exp(-np.logaddexp(0, -rows))
        elif self._activation == "softmax":
            rows = np.exp(rows - rows.max(axis=1, keepdims=True))
            rows /= rows.sum(axis=1, keepdims=True)
        return np.ascontiguousarray(rows[:, 0]) if self._single else rows


class RerankRequest:
    """One call to rerank; see `llamacrab._engine.Request`.

    Parameters
    ----------
    tokenization : Tokenization
        Turns an input into the token ids of a pair.
    inputs : list of str, or Pairs
        The documents of one query, or pairs.
    scoring : Scoring
        Turns rows into scores.
    """

    def __init__(
        self, tokenization: Tokenization, inputs: list[str] | Pairs, scoring: Scoring
    ) -> None:
        self._tokenization = tokenization
        self._scoring = scoring
        self.inputs = inputs

    def job(self, scheduler: Scheduler) -> Job:
        """Return a job for all pairs."""
        return scheduler.job(self._tokenization, len(self.inputs))

    def finish(self, rows: np.ndarray) -> Any:
        """Return scores, or sorted results."""
        return self._scoring(rows)

    def remap_error(self, error: LlamaError) -> None:
        """Give an error the scores of the pairs that were computed."""
        if error.rows is not None:
            error.rows = self._scoring.scores(error.rows)


def _positive(top_k: int) -> int:
    try:
        if (number := operator.index(top_k)) >= 1:
            return number
    except TypeError:
        pass
    raise InputError(f"top_k must be a positive integer, not {top_k!r}")


def warn_about_scores(model: Model) -> None:
    """Warn about a BERT cross-encoder whose file lacks a part that its scores depend on."""
    if model.arch != "bert" or model.vocab.segment_b_offset is not None:
        return
    if not model.has_pooler:
        missing = "llama.cpp's converter left out its pooler (tensor cls.weight)"
    elif (
        model.vocab.vocab_type == VocabType.WPM  # other tokenizers know no segments
        and int(model.metadata.get("tokenizer.ggml.token_type_count", "1")) > 1
    ):
        missing = "llama.cpp treats the document as part of the query (segment A)"
    else:
        return
    warnings.warn(
        f"the scores of {model.path} are wrong: {missing}. Convert the model's Hugging Face folder "
        "with llamacrab.convert, which writes both",
        stacklevel=3,
    )
