"""Scores of causal models without a rank head: the logits of the tokens that they answer with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llamacrab._core import Model, PoolingType
from llamacrab.errors import InputError, PoolingError, UnsupportedModelError
from llamacrab.requests.reranker_families import family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

# Architectures whose graph ends with a norm, the output matrix, and perhaps a bias or a soft cap.
# (Read in src/models/*.cpp of llama.cpp. native/decoder.cpp has the same list.)
ARCHITECTURES = frozenset(
    ("gemma", "gemma2", "gemma3", "llama", "mistral3", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
)
# What llama.cpp takes if the GGUF does not say (llama_hparams::f_final_logit_softcapping).
DEFAULT_CAPS = {"gemma2": 30.0}


class AnswerHead:
    """Turns the rows of the last tokens into scores.

    Parameters
    ----------
    model : Model
        The model.
    answers : sequence of str
        The answer that counts, and the opposite one if there is one. Each must be one token.
    probability : bool
        Score with the probability of the first of two answers, not with the difference of logits.
    divisor : float
        What logits are divided by.

    Attributes
    ----------
    answers : tuple of str
        The parameter.
    probability : bool
        The parameter.

    Raises
    ------
    InputError
        There are not one or two answers, or an answer is not one token.
    UnsupportedModelError
        How the architecture computes logits is not known.
    """

    def __init__(
        self,
        model: Model,
        answers: Sequence[str],
        *,
        probability: bool = False,
        divisor: float = 1.0,
    ) -> None:
        if model.arch not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{model.path} has the architecture {model.arch}, for which answers= is not "
                f"supported; it is for {', '.join(sorted(ARCHITECTURES))}"
            )
        self.answers = tuple(answers)
        self.probability = probability
        self._divisor = divisor
        weights, bias = model.output_rows(_tokens_of(model, self.answers))
        self._weights, self._bias = weights.astype(np.float64), bias.astype(np.float64)
        cap = model.metadata.get(f"{model.arch}.final_logit_softcapping")
        capped = model.arch in ("gemma2", "gemma3")
        self._cap = DEFAULT_CAPS.get(model.arch, 0.0) if cap is None or not capped else float(cap)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return one score per row: float32, shape (n, 1)."""
        logits = _logits(rows, self._weights, self._bias)
        if self._cap:
            logits = self._cap * np.tanh(logits / self._cap)
        scores = logits[:, :1] if len(self.answers) == 1 else logits[:, :1] - logits[:, 1:]
        scores = scores / self._divisor
        if self.probability:
            scores = np.exp(-np.logaddexp(0, -scores))  # the softmax over two logits
        return scores.astype(np.float32)


class RankHead:
    """Computes what llama.cpp does with the rank head of a Qwen3 GGUF, from the last tokens' rows.

    llama.cpp computes the LM head of all tokens on the way to its own result.

    Parameters
    ----------
    model : Model
        A model for which `is_for` is true.
    """

    def __init__(self, model: Model) -> None:
        weights, bias = model.rank_rows()
        self._weights, self._bias = weights.astype(np.float64), bias.astype(np.float64)

    @staticmethod
    def is_for(model: Model) -> bool:
        """Return whether a rank head is one product and a softmax, of the last token's row."""
        return model.arch == "qwen3" and model.has_rank_head and not model.has_pooler

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the probability of each class: float32, shape (n, n_cls_out)."""
        logits = _logits(rows, self._weights, self._bias)
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: np.ndarray = logits / logits.sum(axis=1, keepdims=True)
        return probabilities.astype(np.float32)


def _logits(rows: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = np.empty((len(rows), len(weights)))
    # Row by row: a matrix product may give a row other last bits if there are other rows.
    for i, row in enumerate(rows):
        logits[i] = weights @ row + bias
    return logits


def _tokens_of(model: Model, answers: tuple[str, ...]) -> list[int]:
    """Return the token of each answer."""
    if not 1 <= len(answers) <= 2 or not all(isinstance(answer, str) for answer in answers):
        raise InputError(
            "answers must be one or two strings, the better answer first, such as ('yes', 'no'), "
            f"not {answers!r}"
        )
    tokens = []
    for answer in answers:
        ids = model.vocab.tokenize(answer, add_special=False, parse_special=True).tolist()
        if len(ids) != 1:
            pieces = [model.vocab.token_to_piece(i).decode("utf-8", "replace") for i in ids]
            raise InputError(
                f"the answer {answer!r} is not one token of this model, but {len(ids)}: {pieces}"
            )
        tokens += ids
    if len(set(tokens)) != len(tokens):
        raise InputError(f"both answers are the same token: {answers!r}")
    return tokens


def answer_head(
    model: Model, pooling_type: PoolingType, answers: Sequence[str] | None
) -> AnswerHead | None:
    """Return how to score with a model's answers, or None if it is used in another way.

    Parameters
    ----------
    model : Model
        The model.
    pooling_type : PoolingType
        What the caller asked for.
    answers : sequence of str, optional
        The answers that the caller named.

    Raises
    ------
    InputError
        `answers` are wrong, or contradict `pooling_type`.
    PoolingError
        The caller asked for RANK, but it is not known how to rerank with this model. Or `answers`
        are given for a model that is not causal or has a rank head.
    UnsupportedModelError
        How the architecture computes logits is not known.
    """
    if answers is not None and pooling_type not in (PoolingType.RANK, PoolingType.UNSPECIFIED):
        raise InputError(f"answers= is for pooling_type='rank', not {pooling_type.name}")
    if pooling_type == PoolingType.UNSPECIFIED:
        pooling_type = model.pooling_type
    if answers is None and (
        model.has_rank_head
        # A GGUF of a reranker without a head names no pooling.
        or pooling_type not in (PoolingType.RANK, PoolingType.UNSPECIFIED)
    ):
        return None
    family = family_of(model)
    if answers is None and family is None:
        if pooling_type == PoolingType.RANK and model.is_causal:
            raise PoolingError(
                f"{model.path} has no rank head (no classification head), and no name by which "
                "llamacrab knows a reranker: it is an embedder or a chat model, or was converted "
                "without its head. If it is a reranker that answers with a token, pass its answers "
                "and the format of a pair, such as answers=('yes', 'no'), "
                "template='... {query} ... {document} ...'"
            )
        return None
    if model.has_rank_head:
        raise PoolingError(f"{model.path} has a rank head: leave out answers=")
    if not model.is_causal:
        raise PoolingError(f"answers= is for causal models, which {model.path} is not")
    answers = (answers,) if isinstance(answers, str) else answers
    if family is not None and (answers is None or tuple(answers) == family.answers):
        return AnswerHead(
            model, family.answers, probability=family.probability, divisor=family.divisor
        )
    return AnswerHead(model, answers or ())
