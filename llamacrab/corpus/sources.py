"""The source of a job: files, tables, frames, or any iterable."""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamacrab._support.extras import require
from llamacrab._support.files import content_hashes
from llamacrab.corpus import files
from llamacrab.corpus.columns import Columns
from llamacrab.corpus.files import Wrong
from llamacrab.errors import CorpusError
from llamacrab.requests.texts import as_iterator

# Number of rows that are read at once.
BLOCK = 1024


@dataclass
class Block:
    """Consecutive rows of a source.

    Attributes
    ----------
    first : int
        Number of the first row in the source.
    texts : list of str or None
        None: there is no text to embed.
    carried : pyarrow.Table or None
        The kept columns.
    reasons : dict of int to str
        Why rows have no text, by their place in the block.
    """

    first: int
    texts: list[str | None]
    carried: Any = None
    reasons: dict[int, str] = field(default_factory=dict)

    def refuse_wrong(self) -> None:
        """Raise for the first row without a text; the message has its number."""
        if self.reasons:
            place, why = min(self.reasons.items())
            row = self.first + place
            raise CorpusError(f"row {row}: {why}", row=row)

    def slice(self, start: int, stop: int) -> Block:
        """Return a part of the block."""
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
        Columns to keep.
    kind : str, optional
        What files hold, one of `files.KINDS`; by default what their names say.
    """

    def __init__(
        self, data: Any, *, text: str, keep: tuple[str, ...] = (), kind: str | None = None
    ) -> None:
        self._text = text
        self._keep = keep
        self._kind = kind
        self._paths = files.find(data, kind)
        self._data = data
        self._stamps = self._stamped()
        self.columns = Columns(keep)

    @property
    def has_files(self) -> bool:
        """Whether the source is files, which a job can recognize by their hashes."""
        return self._paths is not None

    def fingerprint(self, stop: threading.Event | None = None) -> list[list[Any]] | None:
        """Return name, size and hash of every file, which takes a while; None without files.

        A source without files is recognized by its rows only.
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
                    f"{path} changed while it was read: start again, with append=True "
                    "(--append) if rows were added at its end"
                )

    def _stamped(self) -> list[tuple[int, int]]:
        found = [path.stat() for path in self._paths or []]
        return [(about.st_size, about.st_mtime_ns) for about in found]

    def n_rows(self) -> int | None:
        """Return the number of rows, or None if that is not known quickly."""
        if self._paths is None:
            table = getattr(self._data, "num_rows", None)
            if isinstance(table, int):
                return table
            return len(self._data) if hasattr(self._data, "__len__") else None
        counts = [files.count_rows(path, files.kind_of(path, self._kind)) for path in self._paths]
        return None if None in counts else sum(count or 0 for count in counts)

    def texts(self, *, refuse_wrong: bool = True) -> list[str | None]:
        """Return the texts of all rows; a row without a text is None, or raises."""
        texts: list[str | None] = []
        for block in self.blocks(0):
            if refuse_wrong:
                block.refuse_wrong()
            texts += block.texts
        return texts

    def blocks(self, start: int) -> Iterator[Block]:
        """Yield the rows from number `start` on."""
        first = 0
        self.columns = Columns(self._keep)
        try:
            for texts, carried, reasons in self._read():
                block = Block(first, texts, carried, reasons)
                first += len(texts)
                if first > start:
                    yield block.slice(max(0, start - block.first), len(texts))
        except _unreadable() as error:
            raise CorpusError(f"cannot read beyond row {first}: {error}") from error

    def _read(self) -> Iterator[tuple[list[str | None], Any, dict[int, str]]]:
        if self._paths is None:
            yield from self._read_data()
            return
        for path in self._paths:
            kind = files.kind_of(path, self._kind)
            if kind in files.TABLES:
                dataset = require("pyarrow.dataset", extra="corpus")
                table = dataset.dataset(path, format=files.TABLES[kind])
                yield from self._from_table(table, path.name)
            else:
                with files.opened(path) as stream:
                    rows = files.rows(stream, kind, path.name, text=self._text, keep=self._keep)
                    yield from self._from_rows(rows)

    def _read_data(self) -> Iterator[tuple[list[str | None], Any, dict[int, str]]]:
        data = self._data
        if hasattr(data, "to_batches"):  # a table or a dataset
            yield from self._from_table(data, "the table")
        elif hasattr(data, "columns") and type(data).__module__.partition(".")[0] == "pandas":
            pa = require("pyarrow", extra="corpus")
            table = pa.Table.from_pandas(data, preserve_index=False)
            yield from self._from_table(table, "the frame")
        elif hasattr(data, "columns") and hasattr(data, "to_arrow"):  # polars
            yield from self._from_table(data.to_arrow(), "the frame")
        elif type(data).__module__.partition(".")[0] == "datasets":
            for table in data.with_format("arrow").iter(batch_size=BLOCK):
                yield from self._from_table(table, "the dataset")
        else:
            yield from self._from_rows(as_iterator(data, "embed_corpus"))

    def _from_table(self, table: Any, name: str) -> Iterator[tuple[list[Any], Any, dict[int, str]]]:
        pa = require("pyarrow", extra="corpus")
        columns = list(dict.fromkeys((self._text, *self._keep)))
        files.refuse_missing(columns, table.schema.names, name)
        batches = (
            table.select(columns).to_batches(max_chunksize=BLOCK)
            if hasattr(table, "select")
            else table.to_batches(columns=columns, batch_size=BLOCK)
        )
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            yield self._gathered(_values(pa, rows.column(self._text)), rows, f"{name}: ")

    def _from_rows(self, rows: Iterable[Any]) -> Iterator[tuple[list[Any], Any, dict[int, str]]]:
        texts: list[Any] = []
        carried: list[dict[str, Any]] = []
        for row in rows:
            if isinstance(row, Mapping):
                found = self._text in row
                texts.append(row[self._text] if found else files.missing_field(row, self._text))
            elif self._keep and isinstance(row, str):
                raise CorpusError(f"plain texts have no column {', '.join(self._keep)} to keep")
            else:
                texts.append(row)
            if self._keep:
                kept = row if isinstance(row, Mapping) else {}
                carried.append({name: kept.get(name) for name in self._keep})
            if len(texts) == BLOCK:
                yield self._gathered(texts, carried)
                texts, carried = [], []
        if texts:
            yield self._gathered(texts, carried)

    def _gathered(self, texts: list[Any], carried: Any, where: str = "") -> Any:
        table, wrong = self.columns.take(carried)
        fitting = [Wrong(wrong[i]) if i in wrong else text for i, text in enumerate(texts)]
        checked, reasons = _checked(fitting, where)
        return checked, table, reasons


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the exceptions that reading a damaged or incomplete file raises."""
    arrow = sys.modules.get("pyarrow")  # if it is not loaded, it has not raised
    return (OSError, EOFError, zlib.error, *([arrow.ArrowException] if arrow else []))


def _checked(values: list[Any], where: str = "") -> tuple[list[str | None], dict[int, str]]:
    """Return texts, None for rows without a text, and the reasons for those."""
    complaints = map(files.complaint, values)
    reasons = {i: where + why for i, why in enumerate(complaints) if why is not None}
    return [None if i in reasons else value for i, value in enumerate(values)], reasons


def _values(pa: Any, column: Any) -> list[Any]:
    """Return the values of a column; `Wrong` stands for those that are not UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        large = pa.types.is_large_string(column.type)
        raw = column.combine_chunks().view(pa.large_binary() if large else pa.binary())
        return [value and _decoded(value) for value in raw.to_pylist()]


def _decoded(value: bytes) -> str | Wrong:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Wrong(str(error))
