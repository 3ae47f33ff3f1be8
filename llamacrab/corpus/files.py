"""Files of texts: find them, tell their kind, and read the rows of those that are not tables.

Lines, JSON lines and comma-separated values need only the standard library, also with gzip or
bzip2. Tables and Zstandard need pyarrow.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from llamacrab._support.extras import require
from llamacrab.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LINES, JSONL, CSV, TSV, PARQUET, ARROW = "lines", "jsonl", "csv", "tsv", "parquet", "arrow"
KINDS = (LINES, JSONL, CSV, TSV, PARQUET, ARROW)
TABLES = {PARQUET: "parquet", ARROW: "ipc"}  # as pyarrow.dataset calls them
SUFFIXES = {
    "": LINES,
    ".txt": LINES,
    ".text": LINES,
    ".md": LINES,
    ".log": LINES,
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
PACKED = (".gz", ".zst", ".bz2")


@dataclass(frozen=True)
class Wrong:
    """Stands for a row that cannot be read, with the reason."""

    reason: str


def find(data: Any, kind: str | None = None) -> list[Path] | None:
    """Return the files that a source names, in order, or None if it names no file.

    Parameters
    ----------
    data : path, glob, list of Path, or anything else
        The source.
    kind : str, optional
        What the files hold, one of `KINDS`; by default what their names say.

    Raises
    ------
    CorpusError
        A file does not exist, or its kind is not known.
    """
    if isinstance(data, (str, Path)):
        # The name of a file that exists is not a pattern, even with brackets. A pattern may be
        # absolute, which Path.glob does not support.
        there = Path(data).exists()
        found = [str(data)] if there else sorted(glob.glob(str(data))) or [str(data)]  # noqa: PTH207
    elif isinstance(data, (list, tuple)) and data and all(isinstance(one, Path) for one in data):
        found = [str(one) for one in data]
    else:
        return None
    paths = [Path(name) for name in found]
    for path in paths:
        if not path.is_file():
            raise CorpusError(
                f"{path} is a folder: name its files, as in '{path}/*.txt'"
                if path.is_dir()
                else f"there is no file {path}"
            )
        if kind_of(path, kind) in TABLES and path.suffix.lower() in PACKED:
            raise CorpusError(f"{path}: tables are not read compressed: unpack it first")
    return paths


def kind_of(path: Path, kind: str | None = None) -> str:
    """Return `kind`, or the kind that the file name says."""
    if kind is not None:
        return kind
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in SUFFIXES:
        raise CorpusError(
            f"{path}: cannot read this kind of file; known are "
            f"{', '.join(filter(None, SUFFIXES))}, text files also compressed "
            f"({', '.join(PACKED)}). If its name is misleading, give input_format "
            f"(--input-format): {', '.join(KINDS)}"
        )
    return SUFFIXES[suffix]


def count_rows(path: Path, kind: str) -> int | None:
    """Return the number of rows, or None if the whole file would have to be parsed."""
    if kind in TABLES:
        dataset = require("pyarrow.dataset", extra="corpus")
        return int(dataset.dataset(path, format=TABLES[kind]).count_rows())
    if kind not in (LINES, JSONL) or path.suffix.lower() in PACKED:
        return None
    with path.open("rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")
        n, last = 0, b"\n"
        for last in pieces:
            n += last.count(b"\n")
    return n + (not last.endswith(b"\n"))


def opened(path: Path) -> BinaryIO:
    """Open a file for reading; a compressed file is decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return cast("BinaryIO", gzip.open(path))
    if suffix == ".bz2":
        import bz2

        return cast("BinaryIO", bz2.open(path))
    if suffix == ".zst":
        pa = require("pyarrow", extra="corpus")
        stream = pa.input_stream(str(path), compression="zstd")
        return cast("BinaryIO", io.BufferedReader(stream))
    return path.open("rb")


def rows(
    stream: BinaryIO, kind: str, name: str, *, text: str, keep: tuple[str, ...] = ()
) -> Iterator[str | dict[str, Any] | Wrong]:
    """Yield the rows of an open file: one str per line, or one dict of fields or columns per row.

    Parameters
    ----------
    stream : binary file
        The content, decompressed.
    kind : {"lines", "jsonl", "csv", "tsv"}
        How to read it.
    name : str
        Name of the file, for messages.
    text : str
        The field or column that holds the text; not used for lines.
    keep : tuple of str
        Other columns that must exist.

    Yields
    ------
    str, dict or Wrong

    Raises
    ------
    CorpusError
        A column is missing, or there is no header with the column names.
    """
    if kind == LINES:
        yield from (line if isinstance(line, Wrong) else line[1] for line in _decoded(stream, name))
    elif kind == JSONL:
        for line in _decoded(stream, name):
            yield line if isinstance(line, Wrong) else _object(*line, text)
    else:
        yield from _records(stream, "\t" if kind == TSV else ",", name, text, keep)


def refuse_missing(wanted: Iterable[str], found: list[str], name: str) -> None:
    """Raise if a table lacks a column; the message lists its columns."""
    if missing := sorted(set(wanted) - set(found)):
        raise CorpusError(
            f"{name} has no column {', '.join(missing)}; its columns are {', '.join(found)}"
        )


def complaint(value: Any) -> str | None:
    """Return why a value is not a text, or None if it is a text."""
    if isinstance(value, Wrong):
        return value.reason
    if value is None:
        return "there is no text: it is null"
    return None if isinstance(value, str) else f"the text is {type(value).__name__}, not str"


def missing_field(row: Iterable[str], text: str) -> Wrong:
    """Return the error for a row without the field of the text."""
    return Wrong(f"there is no field {text!r}; its fields are {', '.join(map(str, row))}")


def _decoded(stream: BinaryIO, name: str) -> Iterator[tuple[str, str] | Wrong]:
    """Yield the place and the text of each line, without its line ending."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        place = f"{name}, line {number}"
        try:
            yield place, line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            yield Wrong(f"{place}: not UTF-8: {error}")


def _object(place: str, line: str, text: str) -> dict[str, Any] | Wrong:
    try:
        row = _parsed(line)
    except (ValueError, RecursionError) as error:
        return Wrong(f"{place}: no JSON: {error}")
    if not isinstance(row, dict):
        return Wrong(f"{place}: the line is no JSON object")
    why = complaint(row[text] if text in row else missing_field(row, text))
    return Wrong(f"{place}: {why}") if why else row


def _parsed(line: str) -> Any:
    row = json.loads(line)
    if "\\ud" in line.lower():
        # JSON can spell half of a surrogate pair, which cannot be written to UTF-8.
        whole = json.dumps(row, ensure_ascii=False).encode("utf-16", "surrogatepass")
        row = json.loads(whole.decode("utf-16", "replace"))
    return row


def _records(
    stream: BinaryIO, delimiter: str, name: str, text: str, keep: tuple[str, ...]
) -> Iterator[dict[str, str] | Wrong]:
    """Yield the rows of a file of comma (or tab) separated values."""
    # A text may be longer than 128 KiB, the default limit, which is process-wide.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    # Bytes that are not UTF-8 become halves of surrogate pairs: the row is wrong, not the file.
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        reader = csv.reader(lines, delimiter=delimiter)
        names = _header(reader, name)
        refuse_missing((text, *keep), names, name)
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Wrong(f"{name}, line {reader.line_num}: {error}")
                continue
            if values:  # an empty line is not a row
                yield _record(values, names, f"{name}, line {reader.line_num}", text)
    finally:
        lines.detach()  # the caller closes the stream


def _header(reader: Any, name: str) -> list[str]:
    try:
        names: list[str] = next(reader, [])
        "".join(names).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        why = error if isinstance(error, csv.Error) else "not UTF-8"
        raise CorpusError(f"{name}: cannot read the names of its columns: {why}") from None
    if not names:
        raise CorpusError(f"{name}: line 1 is empty, where the names of the columns should be")
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise CorpusError(f"{name}: several columns are called {', '.join(twice)}")
    return names


def _record(values: list[str], names: list[str], place: str, text: str) -> dict[str, str] | Wrong:
    if len(values) != len(names):
        return Wrong(f"{place}: {len(values)} values, but {len(names)} columns")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return Wrong(f"{place}: not UTF-8")
    row = dict(zip(names, values, strict=True))
    return row if row[text] else Wrong(f"{place}: there is no text: column {text!r} is empty")
