"""Messages and lines of output."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from llamacrab.errors import CorpusError, LlamaError, TextTooLongError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llamacrab.llama import Llama


def complain(message: str, code: int) -> int:
    """Print a message on one line of standard error, and return `code`."""
    click.echo(f"llamacrab: {' '.join(message.split())}", err=True)
    return code


@contextlib.contextmanager
def length_advice(llama: Llama, *flags: str, what: str = "text") -> Iterator[None]:
    """Name the options that help in the error for a text that is too long."""
    try:
        yield
    except LlamaError as error:
        too_long = error if isinstance(error, TextTooLongError) else error.__cause__
        if not isinstance(too_long, TextTooLongError):
            raise
        row = error.row if isinstance(error, CorpusError) else None
        which = what if what.startswith("the ") else f"{what} {too_long.index}"
        subject = which if row is None else f"row {row}: the text"
        ways = ["--truncate cuts it", *(f"{flag} averages over windows of it" for flag in flags)]
        if too_long.limit < llama.model.n_ctx_train:
            ways.append(f"--n-ctx N makes room for up to {llama.model.n_ctx_train}")
        raise click.ClickException(
            f"{subject} has {too_long.n_tokens} tokens (special tokens counted), "
            f"{too_long.limit} fit: {', or '.join(ways)}"
        ) from None


def one_line(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.splitlines())
