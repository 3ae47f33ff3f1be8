"""From a query and a document to the token ids of the pair that a reranker reads."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llamacrab.errors import TextTooLongError, UnsupportedModelError
from llamacrab.tokens import cut, join

if TYPE_CHECKING:
    import numpy as np

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
    UnsupportedModelError
        The GGUF's template does not hold ``{document}`` exactly once.
    """

    def __init__(self, model: Model, query: str) -> None:
        self._vocab = model.vocab
        template = model.chat_template("rerank")
        # A pair is: head, then the tokens of lead + document + trail, then tail. Lead and trail are
        # the text that touches the document: it must be split into tokens together with it.
        if template is None:
            self._lead = self._trail = ""
            self._head, self._tail = _around_document(self._vocab, query)
        elif template.count("{document}") != 1:
            raise UnsupportedModelError(
                f"the rerank template of {model.path} must hold {{document}} exactly once"
            )
        else:
            before, after = template.split("{document}")
            head = _split_at_special(self._vocab, before, query)
            tail = _split_at_special(self._vocab, after, query)
            self._lead, self._trail = str(head.pop()), str(tail.pop(0))
            self._head = join(*(_ids(self._vocab, piece) for piece in head))
            self._tail = join(*(_ids(self._vocab, piece) for piece in tail))

    def encode(
        self, document: str, *, limit: int, truncate: bool = False, index: int = 0
    ) -> np.ndarray:
        """Return the token ids of the pair, int32 of shape (n,); only the document is ever cut.

        Raises
        ------
        TextTooLongError
            The pair has more than `limit` tokens, and `truncate` is false.
        ContextError
            `limit` leaves no room for the document beside the query and the special tokens.
        """
        content = _ids(self._vocab, self._lead + document + self._trail)
        n_tokens = len(self._head) + len(content) + len(self._tail)
        if n_tokens <= limit:
            return join(self._head, content, self._tail)
        if not truncate:
            raise TextTooLongError(n_tokens, limit, index, "pass truncate=True to cut the document")
        n_lead = len(_ids(self._vocab, self._lead))
        trail = _ids(self._vocab, self._trail)
        room = limit - len(self._head) - len(self._tail) - len(trail) - n_lead
        content = _ids(self._vocab, self._lead + document)
        kept = join(content[:n_lead], cut(content[n_lead:], room))
        return join(self._head, kept, trail, self._tail)


def _ids(vocab: Vocab, piece: str | int) -> np.ndarray:
    return join([piece]) if isinstance(piece, int) else vocab.tokenize(piece, add_special=False)


def _around_document(vocab: Vocab, query: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what stands before and after the document where the GGUF has no template."""
    bos = [vocab.bos] if vocab.add_bos and vocab.bos is not None else []
    closing = vocab.sep if vocab.eos is None else vocab.eos
    eos = [closing] if vocab.add_eos and closing is not None else []
    sep = [vocab.sep] if vocab.add_sep and vocab.sep is not None else []
    return join(bos, _ids(vocab, query), eos, sep), join(eos)


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
