"""Turn a query and a document into the token ids of their pair."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llamacrab._core import Tokenization
from llamacrab.errors import InputError, UnsupportedModelError
from llamacrab.requests.prompts import ids_of, split_at_special

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from llamacrab._core import Model, Vocab
    from llamacrab.options import Truncate

# Number of queries of a `rerank_pairs` call whose tokens are cached.
QUERIES_KEPT = 4096


class PairTemplate:
    """Pairs one query with documents, in the format of llama-server's rerank endpoint.

    The format is the GGUF's chat template named ``rerank`` if it has one, with ``{query}`` and
    ``{document}`` filled in, else ``[BOS] query [EOS][SEP] document [EOS]``, each special token
    only where the GGUF asks for it (llama.cpp, ``format_prompt_rerank`` in tools/server). Only
    the template can hold special tokens: in a query or a document their spelling stays text.

    Parameters
    ----------
    model : Model
        The reranker.
    query : str
        The query.

    Raises
    ------
    InputError
        The query is not a str.
    UnsupportedModelError
        The GGUF's template does not hold ``{document}`` exactly once.
    """

    def __init__(self, model: Model, query: str) -> None:
        if not isinstance(query, str):
            raise InputError(f"the query is {type(query).__name__}, not str")
        self._vocab = vocab = model.vocab
        template = model.chat_template("rerank")
        # A pair is: prefix_ids, then the tokens of prefix_text + document + suffix_text, then
        # suffix_ids. The two texts are tokenized together with the document: tokens may span both.
        self._prefix_text = self._suffix_text = ""
        if template is None:
            prefix, suffix = _around_document(vocab, query)
        elif template.count("{document}") != 1:
            raise UnsupportedModelError(
                f"the rerank template of {model.path} must hold {{document}} exactly once"
            )
        else:
            before, after = template.split("{document}")
            prefix = _filled(split_at_special(vocab, before), query)
            suffix = _filled(split_at_special(vocab, after), query)
            self._prefix_text, self._suffix_text = str(prefix.pop()), str(suffix.pop(0))
        self._prefix_ids = ids_of(vocab, prefix)
        # The document and the tokens after it are BERT's segment B.
        shift = vocab.segment_b_offset or 0
        self._suffix_ids = [token + shift for token in ids_of(vocab, suffix)]

    def tokenization(
        self, *, limit: int, truncate: Truncate = False, larger: str = ""
    ) -> Tokenization:
        """Return a tokenization of documents into the token ids of their pairs with the query.

        Parameters
        ----------
        limit : int
            Tokens of the longest pair.
        truncate : bool or {"end", "start", "middle"}
            Where to cut the document of a pair that is too long. Only the document is cut.
        larger : str
            How to make `limit` larger, for error messages.
        """
        return Tokenization(
            self._vocab,
            limit=limit,
            truncate=truncate,
            prefix_ids=self._prefix_ids,
            suffix_ids=self._suffix_ids,
            prefix_text=self._prefix_text,
            suffix_text=self._suffix_text,
            shift=self._vocab.segment_b_offset or 0,
            text_only=True,
            advice="pass truncate=True to cut the document",
            larger=larger,
        )


def _around_document(vocab: Vocab, query: str) -> tuple[list[str | int], list[str | int]]:
    """Return the pieces before and after the document for a GGUF without a template."""
    closing = vocab.sep if vocab.eos is None else vocab.eos
    bos = vocab.bos if vocab.add_bos else None
    eos = closing if vocab.add_eos else None
    sep = vocab.sep if vocab.add_sep else None
    prefix, suffix = (bos, query, eos, sep), (eos,)
    return [piece for piece in prefix if piece is not None], [p for p in suffix if p is not None]


def _filled(pieces: list[str | int], query: str) -> list[str | int]:
    """Fill the query into the pieces of a template; special tokens in the query stay text."""
    return [
        piece if isinstance(piece, int) else piece.replace("{query}", query) for piece in pieces
    ]


class Pairs:
    """Pairs of a query and a document. A slice gives their token ids.

    Parameters
    ----------
    model : Model
        The reranker.
    pairs : sequence of (str, str)
        Query and document of each pair.
    limit : int
        Tokens of the longest pair.
    truncate : bool or {"end", "start", "middle"}
        Where to cut the document of a pair that is too long.
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
        self._tokenization_of = lru_cache(QUERIES_KEPT)(
            lambda query: PairTemplate(model, query).tokenization(
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
            raise InputError(f"pair {index} is not a (query, document): {pair!r:.80}")
        query, document = pair
        if not isinstance(query, str):
            raise InputError(f"the query of pair {index} is {type(query).__name__}, not str")
        return self._tokenization_of(query).tokenize(document, index)
