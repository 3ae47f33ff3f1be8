"""Find the place of each token in its text. llama.cpp does not return it."""

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
    """Return the start and end in `text` of each of its tokens.

    Parameters
    ----------
    vocab : Vocab
        The vocabulary.
    text : str
        The text.
    ids : ndarray of int32, shape (n,)
        All tokens of the text, in order.
    n_prefix, n_suffix : int
        Number of special tokens at the start and at the end, which are not part of the text.

    Returns
    -------
    ndarray of int32, shape (n, 2)
        ``text[start:stop]``; (0, 0) for the special tokens. A token for a part of a character
        (byte-level vocabularies have such tokens) gets the whole character. An unknown token gets
        the text between its neighbours.
    """
    pieces = [vocab.token_to_piece(int(i)) for i in ids]
    pieces[:n_prefix] = [b""] * n_prefix
    pieces[len(ids) - n_suffix :] = [b""] * n_suffix
    if vocab.vocab_type in (VocabType.BPE, VocabType.SPM):
        # Their pieces are the bytes of the text; SPM adds a space before it.
        encoded = [character.encode() for character in _SURROGATES.sub("\ufffd", text)]
        source = np.repeat(np.arange(len(text)), [len(one) for one in encoded])
        whole = b"".join(encoded)
        if vocab.vocab_type == VocabType.SPM and not whole.startswith(b" "):
            first = next((k for k, piece in enumerate(pieces) if piece), None)
            if first is not None and pieces[first].startswith(b" "):
                pieces[first] = pieces[first][1:]
        return _align(whole, source, pieces)
    # Other vocabularies normalize the text: compare only what no normalization changes.
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
    """Find each piece in `whole`, at its first place after the piece before it."""
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
    """Return which tokens of a text are left, after some were cut out in one place."""
    n_head = int(np.argmin(np.append(full[: len(cut)] == cut[: len(full)], False)))
    n_tail = len(cut) - n_head
    places: np.ndarray = np.r_[0:n_head, len(full) - n_tail : len(full)]
    return places
