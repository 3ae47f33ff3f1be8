"""Rerankers that answer with a token: how they were trained to be asked, and how they are scored.

Such a model is a causal decoder. It reads a query and a document, and its score comes from the
logits of one or two tokens that could follow. If its GGUF has no rank head, it does not say which
tokens, and often not in which format it reads a pair. For the families below, both are found by the
names in the metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamacrab.requests.prompts import normalized_name

if TYPE_CHECKING:
    from llamacrab._core import Model

# Not the base model: a model that was fine-tuned from a reranker may be asked something else.
NAMES = ("general.name", "general.basename")


@dataclass(frozen=True, slots=True)
class RerankerFamily:
    """Rerankers that are asked and scored in the same way.

    Attributes
    ----------
    name : str
        For messages.
    pattern : str
        Regular expression that is found in the names of its models.
    arch : str
        Their architecture. A name alone could be that of something else.
    template : tuple of str
        The format of a pair, with ``{query}`` and ``{document}``. Each part is tokenized on its
        own, as the authors do it.
    instructed : tuple of str, optional
        The format with ``{instruction}``, for a task that the caller describes.
    answers : tuple of str
        The answer that counts, and the opposite one if there is one.
    probability : bool
        The score is the probability of the first answer among the two, not the difference of their
        logits.
    divisor : float
        What logits are divided by.
    """

    name: str
    pattern: str
    arch: str
    template: tuple[str, ...]
    instructed: tuple[str, ...] | None
    answers: tuple[str, ...]
    probability: bool = False
    divisor: float = 1.0


# The model cards huggingface.co/Qwen/Qwen3-Reranker-0.6B, -4B and -8B, "Transformers Usage".
# llama.cpp's converter (conversion/qwen.py) writes the same template, with this instruction.
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_QWEN3 = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)

# github.com/mixedbread-ai/mxbai-rerank, mxbai_rerank/mxbai_rerank_v2.py
_MXBAI_START = (
    "<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
_MXBAI_REST = (
    "\n",
    "document: {document}",
    "\n",
    "You are a search relevance expert who evaluates how well documents match search queries. For "
    "each query-document pair, carefully analyze the semantic relationship between them, then "
    "provide your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
    "<|im_end|>\n<|im_start|>assistant\n",
)

FAMILIES = (
    RerankerFamily(
        name="Qwen3-Reranker",
        pattern="qwen3-reranker",
        arch="qwen3",
        template=(_QWEN3.replace("{instruction}", _QWEN3_INSTRUCTION),),
        instructed=(_QWEN3,),
        answers=("yes", "no"),
        probability=True,
    ),
    RerankerFamily(
        name="mxbai-rerank-v2",
        pattern="mxbai-rerank-(base|large)-v2",
        arch="qwen2",
        template=(_MXBAI_START, "query: {query}", *_MXBAI_REST),
        instructed=(_MXBAI_START, "instruction: {instruction}\nquery: {query}", *_MXBAI_REST),
        answers=("1", "0"),
    ),
    # github.com/FlagOpen/FlagEmbedding, FlagEmbedding/inference/reranker/decoder_only/base.py
    RerankerFamily(
        name="bge-reranker-v2-gemma",
        pattern="bge-reranker-v2-gemma",
        arch="gemma",
        template=(
            "<bos>",
            "A: {query}",
            "\n",
            "B: {document}",
            "\n",
            "Given a query A and a passage B, determine whether the passage contains an answer to "
            "the query by providing a prediction of either 'Yes' or 'No'.",
        ),
        instructed=None,
        answers=("Yes",),
    ),
    # huggingface.co/zeroentropy: modeling_zeranker.py of zerank-1 and -1-small; model card and
    # chat_template.jinja of zerank-2. The query is the system's message, the document the user's.
    # The sigmoid of a score is the probability that they give. (zerank-1 strips both texts first,
    # which is left to the caller here.)
    RerankerFamily(
        name="zerank",
        pattern="zerank-[12]",
        arch="qwen3",
        template=(
            "<|im_start|>system\n{query}<|im_end|>\n"
            "<|im_start|>user\n{document}<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        instructed=None,
        answers=("Yes",),
        divisor=5.0,
    ),
)


def family_of(model: Model) -> RerankerFamily | None:
    """Return the family of a reranker, by the template in its GGUF or else by its name."""
    own, metadata = model.chat_template("rerank"), model.metadata
    names = [normalized_name(metadata.get(key, "")) for key in NAMES]
    families = [family for family in FAMILIES if family.arch == model.arch]
    for family in families:
        if (own,) == family.template:
            return family
    for family in families:
        if any(re.search(family.pattern, name) for name in names):
            return family
    return None
