"""Write finished rows to files. A shard appears only when it is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._support.extras import require
from llamacrab._support.files import settle, sha256_of, temporary, write_whole
from llamacrab.corpus.manifest import Shard
from llamacrab.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = {"parquet": ".parquet", "arrow": ".arrow", "npy": ".npy", "jsonl": ".jsonl"}
ROW, TEXT, VECTOR = "row", "text", "embedding"


def name_of(number: int, kind: str) -> str:
    """Return the name of a shard's file."""
    return f"part-{number:06d}{FORMATS[kind]}"


def rejects_of(name: str) -> str:
    """Return the name of the file that lists the rejected rows of a shard."""
    return f"{Path(name).stem}.rejects.jsonl"


def clean(folder: Path, finished: Sequence[Shard], unfinished: Sequence[str]) -> None:
    """Remove the unfinished files of an earlier run: these shards, and temporary files.

    Raises
    ------
    CorpusError
        There are files of another origin with names of shards. Nothing is removed.
    """
    names = {*unfinished, *(shard.name for shard in finished)}
    names |= {rejects_of(name) for name in names}
    foreign = sorted({path.name for path in folder.glob("part-*")} - names)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CorpusError(
            f"{folder} holds {foreign[0]}{more}, which its manifest does not list: move or remove "
            "such files, or use another folder"
        )
    for name in unfinished:
        (folder / name).unlink(missing_ok=True)
        (folder / rejects_of(name)).unlink(missing_ok=True)
    for pattern in (".part-*.tmp", ".manifest.json.*.tmp", ".lock.json.*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()


def write(
    folder: Path,
    name: str,
    kind: str,
    numbers: np.ndarray,
    texts: list[str] | None,
    carried: Any,
    vectors: np.ndarray,
    rejects: list[dict[str, Any]],
    *,
    first: int,
    n_read: int,
    rows: str,
) -> Shard:
    """Write one shard, and the list of its rejected rows.

    Parameters
    ----------
    numbers : ndarray of int64, shape (n,)
        Row numbers in the source.
    texts : list of str, or None
        The texts, if they are kept.
    carried : pyarrow.Table or None
        The kept columns.
    vectors : ndarray, shape (n, d)
        The embeddings.
    rejects : list of dict
        Rows without an embedding, each with its number and the reason.
    first, n_read : int
        First row and number of rows of the source that the shard covers.
    rows : str
        The hash of those rows.
    """
    partial = temporary(folder / name)
    listed = folder / rejects_of(name)
    try:
        if kind == "npy":
            with partial.open("wb") as file:
                np.save(file, vectors)
        else:
            _write_table(_table(numbers, texts, carried, vectors), partial, kind)
        if rejects:
            lines = (json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
            write_whole(listed, "".join(lines).encode())
        checksum = sha256_of(partial)
        settle(partial, folder / name)
    except BaseException:
        # On a full disk a partial file would only take space.
        partial.unlink(missing_ok=True)
        listed.unlink(missing_ok=True)
        raise
    return Shard(name, first, n_read, len(vectors), checksum, rows)


def recast(folder: Path, name: str, types: dict[str, Any]) -> Path | None:
    """Write a shard again with these column types, and return the temporary file.

    Return None if the shard has these types already.
    """
    path = folder / name
    kind = next(kind for kind, suffix in FORMATS.items() if suffix == path.suffix)
    table = _read_table(path, kind)
    changed = [column for column, one in types.items() if table.schema.field(column).type != one]
    if not changed:
        return None
    for column in changed:
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, table.column(column).cast(types[column]))
    partial = temporary(path)
    try:
        _write_table(table, partial, kind)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _read_table(path: Path, kind: str) -> Any:
    if kind == "parquet":
        with require("pyarrow.parquet", extra="corpus").ParquetFile(path) as file:
            return file.read()
    pa = require("pyarrow", extra="corpus")
    with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as file:
        return file.read_all()


def _write_table(table: Any, path: Path, kind: str) -> None:
    if kind == "parquet":
        require("pyarrow.parquet", extra="corpus").write_table(table, path)
    elif kind == "arrow":
        pa = require("pyarrow", extra="corpus")
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    else:
        with path.open("w", encoding="utf-8") as file:
            for row in table.to_pylist():
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _table(numbers: np.ndarray, texts: list[str] | None, carried: Any, vectors: np.ndarray) -> Any:
    pa = require("pyarrow", extra="corpus")
    columns = {ROW: pa.array(numbers)}
    if texts is not None:
        columns[TEXT] = pa.array(texts, type=pa.large_string())
    if carried is not None:
        for name in carried.column_names:
            columns[name] = carried.column(name)
    values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    columns[VECTOR] = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    return pa.table(columns)
