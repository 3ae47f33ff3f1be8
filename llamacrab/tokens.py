"""From a text to the token ids that the model reads: special tokens, and a limit on length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llamacrab._core import Vocab, as_token_ids
from llamacrab.errors import ContextError, EmptyInputError, InputError, TextTooLongError

if TYPE_CHECKING:
    from collections.abc import Sequence


def encode(
    vocab: Vocab,
    text: str | Sequence[int] | np.ndarray,
    *,
    limit: int,
    truncate: bool = False,
    start_token: bool = True,
    parse_special: bool = False,
    index: int = 0,
) -> np.ndarray:
    """Return the token ids of a text, at most `limit` of them.

    Parameters
    ----------
    vocab : Vocab
        The model's vocabulary.
    text : str or sequence of int
        A text, or token ids, which are taken as they are: no special token is added.
    limit : int
        Tokens that fit, special tokens counted.
    truncate : bool
        Cut the end of a text that is too long, but keep the special tokens that close it.
    start_token : bool
        Begin with the token that the model was trained to see first (BOS or CLS), if it has one.
    parse_special : bool
        Read the spelling of a special token in the text as that token.
    index : int
        Which text of the call it is, for error messages.

    Returns
    -------
    ndarray of int32, shape (n,)

    Raises
    ------
    TextTooLongError
        The text has more than `limit` tokens, and `truncate` is false.
    EmptyInputError
        There are no tokens.
    InputError
        It is neither a str nor token ids of this vocabulary.
    ContextError
        `limit` leaves no room for the special tokens.
    """
    if isinstance(text, str):
        content = vocab.tokenize(text, add_special=False, parse_special=parse_special)
        prefix = vocab.prefix if start_token else ()
        suffix = vocab.suffix
    elif isinstance(text, (bytes, bytearray)) or not hasattr(text, "__len__"):
        raise InputError(f"text {index} is {type(text).__name__}, not str or a sequence of ids")
    else:
        content = as_token_ids(text)
        wrong = content[(content < 0) | (content >= len(vocab))]
        if wrong.size:
            raise InputError(f"text {index}: token id {wrong[0]} is not in range({len(vocab)})")
        # Ids that end with the closing tokens keep them through a cut, as a text does.
        prefix = ()
        n_close = len(vocab.suffix)
        closed = 0 < n_close < len(content) and tuple(content[-n_close:]) == vocab.suffix
        suffix = vocab.suffix if closed else ()
        content = content[: len(content) - len(suffix)]

    n_tokens = len(prefix) + len(content) + len(suffix)
    if n_tokens == 0:
        raise EmptyInputError(f"text {index} has no tokens")
    if n_tokens > limit:
        if not truncate:
            raise TextTooLongError(n_tokens, limit, index)
        content = cut(content, limit - len(prefix) - len(suffix))
    return join(prefix, content, suffix)


def cut(content: np.ndarray, room: int) -> np.ndarray:
    """Return the first `room` ids; a limit that leaves room for none is refused."""
    if room < 1:
        raise ContextError(
            f"no room is left for the text beside its special tokens ({room} tokens): make n_ctx "
            "larger"
        )
    return content[:room]


def join(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the parts one after the other, as int32."""
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
