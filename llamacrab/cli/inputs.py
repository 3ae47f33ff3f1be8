"""Read the texts of a command from files or from a stream."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from llamacrab.corpus import files
from llamacrab.corpus.sources import Source

if TYPE_CHECKING:
    from collections.abc import Iterable


def open_input(
    source: str, field: str, input_format: str | None, keep: tuple[str, ...] = ()
) -> str | Iterable[Any]:
    """Return an argument in the form that `Source` takes: files, or the rows of a stream."""
    path = Path(source)
    stream = source == "-" or (path.exists() and not path.is_file() and not path.is_dir())
    if source == "-":
        kinds = {input_format or files.LINES}
    else:
        found = [path] if stream else files.find(source, input_format) or []
        kinds = {files.kind_of(one, input_format) for one in found}
    field_source = click.get_current_context().get_parameter_source("field")
    if kinds == {files.LINES} and field_source is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError(
            f"--field {field}: lines of plain text have no fields; if {source} holds something "
            "else, name its format with --input-format"
        )
    if not stream:
        return source
    kind = kinds.pop()
    if kind in files.TABLES:
        raise click.UsageError(f"--input-format {kind}: such tables must be files, not a stream")
    name = "standard input" if source == "-" else source
    opened = sys.stdin.buffer if source == "-" else path.open("rb")
    return files.rows(opened, kind, name, text=field, keep=keep)


def read_texts(data: str | Iterable[Any], field: str, input_format: str | None) -> list[str]:
    """Return the texts of all rows; raise for a row without a text."""
    return cast("list[str]", Source(data, text=field, kind=input_format).texts())
