"""Where in a text its tokens come from. llama.cpp does not say: tokens are laid along the text."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, AnyStr

import numpy as np

from llamacrab._core import VocabType

if TYPE_CHECKING:
    from llamacrab._core import Vocab

_SURROGATES = re.compile("[\ud800-\udfff]")


def token_offsets(
    vocab: Vocab, text: str, ids: np.ndarray, *, n_prefix: int, n_suffix: int
) -> np.ndarray:
    """Return the place in `text` of each of its tokens.

    Parameters
    ----------
    vocab : Vocab
        The vocabulary.
    text : str
        The text.
    ids : ndarray of int32, shape (n,)
        All of its tokens, in order.
    n_prefix, n_suffix : int
        How many of the first and the last are special tokens that come from no text.

    Returns
    -------
    ndarray of int32, shape (n, 2)
        ``text[start:stop]``; (0, 0) for those special tokens. A token that holds a part of a
        character, as byte-level vocabularies have them, gets the whole character. Tokens for what
        the vocabulary does not know get all that lies between their neighbours.
    """
    pieces = [vocab.token_to_piece(int(i)) for i in ids]
    pieces[:n_prefix] = [b""] * n_prefix
    pieces[len(ids) - n_suffix :] = [b""] * n_suffix
    if vocab.vocab_type in (VocabType.BPE, VocabType.SPM):
        # Their pieces are the very bytes of the text, but for a space that SPM puts before it.
        encoded = [character.encode() for character in _SURROGATES.sub("\ufffd", text)]
        source = np.repeat(np.arange(len(text)), [len(one) for one in encoded])
        whole = b"".join(encoded)
        if vocab.vocab_type == VocabType.SPM and not whole.startswith(b" "):
            first = next((k for k, piece in enumerate(pieces) if piece), None)
            if first is not None and pieces[first].startswith(b" "):
                pieces[first] = pieces[first][1:]
        return _align(whole, source, pieces)
    # The others normalize: characters are compared by what is left of them at the least.
    folded = [_fold(character) for character in text]
    source = np.repeat(np.arange(len(text)), [len(one) for one in folded])
    return _align("".join(folded), source, [_fold(p.decode("utf-8", "replace")) for p in pieces])


def _fold(text: str) -> str:
    """Drop case, accents, whitespace and compatibility forms."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    return "".join(
        c
        for c in unicodedata.normalize("NFKD", decomposed)
        if not c.isspace() and unicodedata.category(c) not in ("Mn", "Cc", "Cf")
    )


def _align(whole: AnyStr, source: np.ndarray, pieces: list[AnyStr]) -> np.ndarray:
    """Lay pieces along the whole, each at its first place after the one before it."""
    spans: list[tuple[int, int]] = []  # in `whole`
    unknown: list[int] = []  # pieces whose place is not known until the next is found
    at = 0

    def settle(stop: int) -> None:
        for k in unknown:
            spans[k] = (at, stop)
        unknown.clear()

    for k, piece in enumerate(pieces):
        spans.append((0, 0))
        found = whole.find(piece, at) if piece else at
        if found < 0:
            unknown.append(k)
        elif piece:
            settle(found)
            spans[k] = (found, found + len(piece))
            at = found + len(piece)
    settle(len(whole))
    return np.array(
        [(source[a], source[b - 1] + 1) if b > a else (0, 0) for a, b in spans], dtype=np.int32
    ).reshape(-1, 2)


def kept(full: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Return which tokens of a text are left of it, where some were cut out of one place."""
    n_head = int(np.argmin(np.append(full[: len(cut)] == cut[: len(full)], False)))
    n_tail = len(cut) - n_head
    places: np.ndarray = np.r_[0:n_head, len(full) - n_tail : len(full)]
    return places
