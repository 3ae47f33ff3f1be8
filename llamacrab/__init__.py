"""Embedding and reranking with GGUF models: a batch scheduler over llama.cpp.

>>> from llamacrab import Llama
>>> with Llama() as llama:
...     llama.embed("Rust is memory-safe.").shape
(384,)
"""

from llamacrab._core import Batch, Context, Model, PoolingType, SplitMode, Vocab, VocabType
from llamacrab._support.versions import __version__, show_versions
from llamacrab.corpus import embed_corpus
from llamacrab.errors import LlamaError
from llamacrab.llama import Llama, TokenEmbeddings
from llamacrab.models.convert import convert
from llamacrab.models.default import fetch_default_model
from llamacrab.options import EmbedOptions
from llamacrab.requests.reranking import RerankResult

__all__ = [
    "Batch",
    "Context",
    "EmbedOptions",
    "Llama",
    "LlamaError",
    "Model",
    "PoolingType",
    "RerankResult",
    "SplitMode",
    "TokenEmbeddings",
    "Vocab",
    "VocabType",
    "__version__",
    "convert",
    "embed_corpus",
    "fetch_default_model",
    "show_versions",
]
