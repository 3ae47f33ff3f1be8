"""What a model was trained to see before a query and before a document.

A GGUF made by `llamacrab convert` holds its model's prompts, as ``llamacrab.prompt.<name>``. Other
GGUFs hold none: the families below are known by the names that their metadata gives. A model that
is not known has no prompts: nothing is ever put before its texts unasked.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "llamacrab.prompt."
NAMES = ("general.name", "general.basename", "general.finetune", "general.base_model.0.name")

_SEARCH = "Represent this sentence for searching relevant passages: "
_INSTRUCT = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)

# Pattern of a name, and the prompts of that family as its authors publish them, on the model card
# or in its config_sentence_transformers.json. The first that matches counts.
FAMILIES: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "nomic-embed-text",
        {
            "query": "search_query: ",
            "document": "search_document: ",
            "classification": "classification: ",
            "clustering": "clustering: ",
        },
    ),
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
    # Trained without prompts, and known to be.
    ("bge-m3|gte-(small|base|large)|all-minilm|all-mpnet", {"query": "", "document": ""}),
)


def prompts_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the prompts of a model by name, empty where none are known.

    Parameters
    ----------
    metadata : mapping of str to str
        Of its GGUF, as `Model.metadata`.
    """
    own = {key[len(KEY) :]: value for key, value in metadata.items() if key.startswith(KEY)}
    if own:
        return own
    for key in NAMES:
        # "Bge Small En v1.5" and "bge-small-en-v1.5" are the same model.
        name = re.sub(r"[\s_]+", "-", metadata.get(key, "").lower())
        for pattern, prompts in FAMILIES:
            if name and re.search(pattern, name):
                return dict(prompts)
    return {}
