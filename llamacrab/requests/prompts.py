"""The prompts that a model was trained to see before a query and before a document.

A GGUF made by `llamacrab convert` holds its model's prompts, as ``llamacrab.prompt.<name>``. Other
GGUFs hold none: for the families below, prompts are found by the names in the metadata. An unknown
model has no prompts: nothing is put before its texts unless the caller asks for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llamacrab._core import Vocab

KEY = "llamacrab.prompt."
NAMES = ("general.name", "general.basename", "general.finetune", "general.base_model.0.name")

_SEARCH = "Represent this sentence for searching relevant passages: "
_INSTRUCT = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)

_NOMIC = {
    "query": "search_query: ",
    "document": "search_document: ",
    "classification": "classification: ",
    "clustering": "clustering: ",
}

# Pattern of a name, and the prompts of that family as its authors publish them, on the model card
# or in its config_sentence_transformers.json. The first match counts.
FAMILIES: tuple[tuple[str, dict[str, str]], ...] = (
    # Both families are trained with these: contrastors, eval/mteb_eval/eval_mteb.py, by Nomic.
    ("nomic-embed-text|modernbert-embed", _NOMIC),
    (
        "embedding-?gemma",
        {
            "query": "task: search result | query: ",
            "document": "title: none | text: ",
            "classification": "task: classification | query: ",
            "clustering": "task: clustering | query: ",
            "similarity": "task: sentence similarity | query: ",
            "code": "task: code retrieval | query: ",
            "question-answering": "task: question answering | query: ",
            "fact-checking": "task: fact checking | query: ",
        },
    ),
    ("qwen3-embedding", {"query": _INSTRUCT, "document": ""}),
    ("gte-qwen2", {"query": _INSTRUCT + " ", "document": ""}),
    ("(e5-.*-instruct)", {"query": _INSTRUCT + " ", "document": ""}),
    (r"\be5-", {"query": "query: ", "document": "passage: "}),
    ("snowflake-arctic-embed.*-v2", {"query": "query: ", "document": ""}),
    ("snowflake-arctic-embed", {"query": _SEARCH, "document": ""}),
    ("mxbai-embed", {"query": _SEARCH, "document": ""}),
    (
        "bge-(small|base|large)-zh",
        {"query": "为这个句子生成表示以用于检索相关文章：", "document": ""},
    ),
    ("bge-(small|base|large)-en", {"query": _SEARCH, "document": ""}),
    # <instruct> and <query> are special tokens: FlagEmbedding, inference/embedder/model_mapping.py;
    # the instruction is that of its tutorial 1.2.1.
    (
        "bge-multilingual-gemma2",
        {
            "query": "<instruct>Given a web search query, retrieve relevant passages that answer "
            "the query.\n<query>",
            "document": "",
        },
    ),
    # config_sentence_transformers.json: retrieval.query and retrieval.passage.
    (
        "jina-embeddings-v3",
        {
            "query": "Represent the query for retrieving evidence documents: ",
            "document": "Represent the document for retrieval: ",
        },
    ),
    # Known to be trained without prompts.
    ("bge-m3|gte-(small|base|large)|all-minilm|all-mpnet", {"query": "", "document": ""}),
)


def prompts_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the prompts of a model by name, empty if none are known.

    Parameters
    ----------
    metadata : mapping of str to str
        The metadata of its GGUF, as `Model.metadata`.
    """
    own = {key[len(KEY) :]: value for key, value in metadata.items() if key.startswith(KEY)}
    if own:
        return own
    for key in NAMES:
        name = normalized_name(metadata.get(key, ""))
        for pattern, prompts in FAMILIES:
            if name and re.search(pattern, name):
                return dict(prompts)
    return {}


def normalized_name(name: str) -> str:
    """Return a model's name as on the Hub: "Bge Small En v1.5" is "bge-small-en-v1.5"."""
    return re.sub(r"[\s_]+", "-", name.lower())


def split_at_special(vocab: Vocab, text: str) -> list[str | int]:
    """Split a prompt or a template into pieces: texts, and between them ids of special tokens.

    The first and the last piece are texts, possibly empty. Text that is filled in or appended later
    is not searched for special tokens.
    """
    spelled = {
        vocab.token_to_piece(int(token)).decode("utf-8", "replace"): int(token)
        for token in vocab.tokenize(text, add_special=False, parse_special=True)
        if vocab.is_control(int(token))
    }
    spelled.pop("", None)
    if not spelled:
        return [text]
    longest_first = sorted(spelled, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [spelled[part] if i % 2 else part for i, part in enumerate(parts)]


def ids_of(vocab: Vocab, pieces: list[str | int]) -> list[int]:
    """Return the token ids of the pieces that `split_at_special` returns."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += vocab.tokenize(piece, add_special=False).tolist()
    return ids
