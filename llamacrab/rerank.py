"""From a query and a document to the token ids of the pair that a reranker reads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from llamacrab._core import Encoder
from llamacrab.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from llamacrab._core import Model, Vocab


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
            head = _split_at_special(vocab, before, query)
            tail = _split_at_special(vocab, after, query)
            self._lead, self._trail = str(head.pop()), str(tail.pop(0))
        self._head = [token for piece in head for token in _ids(vocab, piece)]
        self._tail = [token for piece in tail for token in _ids(vocab, piece)]

    def encoder(self, *, limit: int, truncate: bool = False) -> Encoder:
        """Return what turns a document into the token ids of its pair with the query.

        Parameters
        ----------
        limit : int
            Tokens of the longest pair.
        truncate : bool
            Cut a document that is too long beside the query; never anything else.
        """
        return Encoder(
            self._vocab,
            limit=limit,
            truncate=truncate,
            prefix=self._head,
            suffix=self._tail,
            lead=self._lead,
            trail=self._trail,
            text_only=True,
        )


def _ids(vocab: Vocab, piece: str | int) -> np.ndarray | list[int]:
    return [piece] if isinstance(piece, int) else vocab.tokenize(piece, add_special=False)


def _around_document(vocab: Vocab, query: str) -> tuple[list[str | int], list[str | int]]:
    """Return what stands before and after the document where the GGUF has no template."""
    closing = vocab.sep if vocab.eos is None else vocab.eos
    bos = vocab.bos if vocab.add_bos else None
    eos = closing if vocab.add_eos else None
    sep = vocab.sep if vocab.add_sep else None
    head, tail = (bos, query, eos, sep), (eos,)
    return [piece for piece in head if piece is not None], [p for p in tail if p is not None]


def _split_at_special(vocab: Vocab, template: str, query: str) -> list[str | int]:
    """Return texts and, between them, ids of special tokens; the query is filled in.

    A text stands first and last, empty where need be. Splitting before filling keeps what the query
    spells from being read as special tokens.
    """
    spelled = {
        vocab.token_to_piece(int(token)).decode("utf-8", "replace"): int(token)
        for token in vocab.tokenize(template, add_special=False, parse_special=True)
        if vocab.is_control(int(token))
    }
    spelled.pop("", None)
    if not spelled:
        return [template.replace("{query}", query)]
    longest_first = sorted(spelled, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", template)
    return [
        spelled[part] if i % 2 else part.replace("{query}", query) for i, part in enumerate(parts)
    ]
