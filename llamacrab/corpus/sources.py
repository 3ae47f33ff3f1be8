"""Where the texts of a job come from: files, tables, frames, or any iterable."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamacrab._extras import require
from llamacrab._files import content_hashes
from llamacrab.corpus.columns import Columns
from llamacrab.errors import CorpusError

# Rows that are read at once.
BLOCK = 1024
LINES = (".txt", ".jsonl", ".ndjson")
CSV = (".csv", ".tsv")
TABLES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc"}
PACKED = (".gz", ".zst", ".bz2")


@dataclass
class Block:
    """Rows that follow one another.

    Attributes
    ----------
    first : int
        The number of the first in the source.
    texts : list of str or None
        None: there is no text that could be embedded.
    carried : pyarrow.Table or None
        The columns that go along.
    reasons : dict of int to str
        What is wrong with rows, by their place in the block.
    """

    first: int
    texts: list[str | None]
    carried: Any = None
    reasons: dict[int, str] = field(default_factory=dict)

    def slice(self, start: int, stop: int) -> Block:
        """Return a part of it."""
        return Block(
            self.first + start,
            self.texts[start:stop],
            None if self.carried is None else self.carried.slice(start, stop - start),
            {i - start: why for i, why in self.reasons.items() if start <= i < stop},
        )


class Source:
    """The rows of a job, always the same and in the same order.

    Parameters
    ----------
    data : path, glob, list of paths, Arrow table or dataset, data frame, or iterable
        See `embed_corpus`.
    text : str
        The column, or the field of a line, that holds the text.
    keep : sequence of str
        Columns that go along.
    """

    def __init__(self, data: Any, *, text: str, keep: tuple[str, ...]) -> None:
        self._text = text
        self._keep = keep
        self._paths = _paths(data)
        self._data = data
        self._pa = require("pyarrow", extra="corpus")
        self._stamps = self._stamped()
        self.columns = Columns(keep)

    @property
    def has_files(self) -> bool:
        """Whether it can be known again without being read."""
        return self._paths is not None

    def fingerprint(self, stop: threading.Event | None = None) -> list[list[Any]] | None:
        """Return name, size and hash of every file, which takes a while; None without files.

        What has no files is known by its rows alone.
        """
        if self._paths is None:
            return None
        hashes = content_hashes(self._paths, stop)
        sizes = [path.stat().st_size for path in self._paths]
        names = [path.name for path in self._paths]
        return [list(one) for one in zip(names, sizes, hashes, strict=True)]

    def refuse_changed(self) -> None:
        """Raise if a file has changed since this source was made."""
        for path, before, now in zip(
            self._paths or [], self._stamps, self._stamped(), strict=False
        ):
            if before != now:
                raise CorpusError(
                    f"{path} has changed while it was read: start again, with append=True "
                    "(--append) if rows were added at its end"
                )

    def _stamped(self) -> list[tuple[int, int]]:
        found = [path.stat() for path in self._paths or []]
        return [(about.st_size, about.st_mtime_ns) for about in found]

    def n_rows(self) -> int | None:
        """Return how many rows there are, where that is soon known."""
        if self._paths is None:
            table = getattr(self._data, "num_rows", None)
            if isinstance(table, int):
                return table
            return len(self._data) if hasattr(self._data, "__len__") else None
        counts = [_n_rows(path) for path in self._paths]
        return None if None in counts else sum(count or 0 for count in counts)

    def blocks(self, start: int) -> Iterator[Block]:
        """Yield the rows from row `start` on."""
        first = 0
        self.columns = Columns(self._keep)
        try:
            for texts, carried, reasons in self._read():
                block = Block(first, texts, carried, reasons)
                first += len(texts)
                if first > start:
                    yield block.slice(max(0, start - block.first), len(texts))
        except (self._pa.ArrowException, OSError, EOFError) as error:
            raise CorpusError(f"cannot read beyond row {first}: {error}") from error

    def _read(self) -> Iterator[tuple[list[str | None], Any, dict[int, str]]]:
        if self._paths is None:
            yield from self._read_data()
            return
        for path in self._paths:
            kind = _kind(path)
            if kind in LINES:
                yield from self._from_rows(_lines(self._pa, path, kind))
            elif kind in CSV:
                yield from self._from_rows(_records(self._pa, path, kind, self._wanted()))
            else:
                dataset = require("pyarrow.dataset", extra="corpus")
                yield from self._from_table(dataset.dataset(path, format=TABLES[kind]), str(path))

    def _read_data(self) -> Iterator[tuple[list[str | None], Any, dict[int, str]]]:
        data, pa = self._data, self._pa
        if hasattr(data, "to_batches"):  # a table or a dataset
            yield from self._from_table(data, "the table")
        elif type(data).__module__.partition(".")[0] == "pandas":
            yield from self._from_table(
                pa.Table.from_pandas(data, preserve_index=False), "the frame"
            )
        elif hasattr(data, "to_arrow"):  # polars
            yield from self._from_table(data.to_arrow(), "the frame")
        elif type(data).__module__.partition(".")[0] == "datasets":
            for table in data.with_format("arrow").iter(batch_size=BLOCK):
                yield from self._from_table(table, "the dataset")
        else:
            yield from self._from_rows(data)

    def _wanted(self) -> list[str]:
        return list(dict.fromkeys((self._text, *self._keep)))

    def _from_table(self, table: Any, name: str) -> Iterator[tuple[list[Any], Any, dict[int, str]]]:
        columns = self._wanted()
        _refuse_missing(columns, table.schema.names, name)
        batches = (
            table.select(columns).to_batches(max_chunksize=BLOCK)
            if hasattr(table, "select")
            else table.to_batches(columns=columns, batch_size=BLOCK)
        )
        for batch in batches:
            rows = self._pa.Table.from_batches([batch])
            yield self._gathered(_values(self._pa, rows.column(self._text)), rows)

    def _from_rows(self, rows: Iterable[Any]) -> Iterator[tuple[list[Any], Any, dict[int, str]]]:
        texts: list[Any] = []
        carried: list[dict[str, Any]] = []
        for row in rows:
            if isinstance(row, Mapping):
                texts.append(row.get(self._text, _Wrong(f"there is no field {self._text!r}")))
            else:
                texts.append(row)
            kept = row if isinstance(row, Mapping) else {}
            carried.append({name: kept.get(name) for name in self._keep})
            if len(texts) == BLOCK:
                yield self._gathered(texts, carried)
                texts, carried = [], []
        if texts:
            yield self._gathered(texts, carried)

    def _gathered(self, texts: list[Any], carried: Any) -> Any:
        table, wrong = self.columns.take(carried)
        fitting = [_Wrong(wrong[i]) if i in wrong else text for i, text in enumerate(texts)]
        checked, reasons = _checked(fitting)
        return checked, table, reasons


@dataclass(frozen=True)
class _Wrong:
    """Stands for a row that cannot be read."""

    reason: str


def _checked(values: list[Any]) -> tuple[list[str | None], dict[int, str]]:
    """Return texts, None where there is none, and what is wrong with those."""
    reasons = {}
    for i, value in enumerate(values):
        if isinstance(value, _Wrong):
            reasons[i] = value.reason
        elif value is None:
            reasons[i] = "there is no text"
        elif not isinstance(value, str):
            reasons[i] = f"the text is {type(value).__name__}, not str"
    return [None if i in reasons else value for i, value in enumerate(values)], reasons


def _refuse_missing(wanted: Iterable[str], found: list[str], name: str) -> None:
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise CorpusError(
            f"{name} has no column {', '.join(missing)}; its columns are {', '.join(found)}"
        )


def _values(pa: Any, column: Any) -> list[Any]:
    """Return the values of a column, with what is wrong with those that are no UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        large = pa.types.is_large_string(column.type)
        raw = column.combine_chunks().view(pa.large_binary() if large else pa.binary())
        return [value and _decoded(value) for value in raw.to_pylist()]


def _decoded(value: bytes) -> str | _Wrong:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return _Wrong(str(error))


def _n_rows(path: Path) -> int | None:
    """Return the rows of a file of lines or of a table; None where it must be read for that."""
    suffix = path.suffix.lower()
    if suffix in TABLES:
        dataset = require("pyarrow.dataset", extra="corpus")
        return int(dataset.dataset(path, format=TABLES[suffix]).count_rows())
    if suffix not in LINES:
        return None
    with path.open("rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")
        n, last = 0, b"\n"
        for last in pieces:
            n += last.count(b"\n")
    return n + (not last.endswith(b"\n"))


def _records(pa: Any, path: Path, kind: str, wanted: list[str]) -> Iterator[Any]:
    """Yield the rows of a file of comma (or tab) separated values as dicts of str."""
    # A text may be longer than the 128 KiB that are the module's default for all of a process.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    with pa.input_stream(str(path), compression="detect") as stream:
        # Bytes that are no UTF-8 become halves of surrogate pairs: a row's fault, not the file's.
        lines = io.TextIOWrapper(
            io.BufferedReader(stream), "utf-8-sig", errors="surrogateescape", newline=""
        )
        rows = csv.reader(lines, delimiter="\t" if kind == ".tsv" else ",")
        names = next(rows, [])
        _refuse_missing(wanted, names, path.name)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Wrong(f"{path.name}, line {rows.line_num}: {error}")
                continue
            if row:  # an empty line is no row
                yield _record(row, names, f"{path.name}, line {rows.line_num}")


def _record(row: list[str], names: list[str], place: str) -> dict[str, str] | _Wrong:
    if len(row) != len(names):
        return _Wrong(f"{place}: {len(row)} values, but {len(names)} columns")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return _Wrong(f"{place}: not UTF-8")
    return dict(zip(names, row, strict=True))


def _lines(pa: Any, path: Path, kind: str) -> Iterator[Any]:
    """Yield the texts, or the fields, of the lines of a file, which may be compressed."""
    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream)):
            if not number:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                decoded = line.rstrip(b"\r\n").decode()
                row = decoded if kind == ".txt" else json.loads(decoded)
            except ValueError as error:  # no UTF-8, or no JSON
                yield _Wrong(f"{path.name}: {error}")
                continue
            if kind != ".txt" and not isinstance(row, dict):
                row = _Wrong(f"{path.name}: the line is no JSON object")
            yield row


def _paths(data: Any) -> list[Path] | None:
    """Return the files that a source names, in order; None where it is no file."""
    if isinstance(data, (str, Path)):
        # A pattern may be absolute, which Path.glob takes no more.
        found = sorted(glob.glob(str(data))) or [str(data)]  # noqa: PTH207
    elif isinstance(data, (list, tuple)) and data and all(isinstance(one, Path) for one in data):
        found = [str(one) for one in data]
    else:
        return None
    paths = [Path(name) for name in found]
    for path in paths:
        if not path.is_file():
            raise CorpusError(f"there is no file {path}")
        if _kind(path) not in (*LINES, *CSV, *TABLES):
            raise CorpusError(
                f"{path}: cannot read this kind of file; known are "
                + ", ".join((*LINES, *CSV, *TABLES))
                + f", text files also compressed ({', '.join(PACKED)})"
            )
    return paths


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
