"""Finished rows as files. A shard is there whole, or it is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._support.extras import require
from llamacrab._support.fetch import sha256_of
from llamacrab.corpus.manifest import Shard, sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = {"parquet": ".parquet", "arrow": ".arrow", "npy": ".npy", "jsonl": ".jsonl"}
ROW, TEXT, VECTOR = "row", "text", "embedding"


def name_of(number: int, kind: str) -> str:
    """Return the name of a shard's file."""
    return f"part-{number:06d}{FORMATS[kind]}"


def rejects_of(name: str) -> str:
    """Return the name of the file with the rows that a shard lacks."""
    return f"{Path(name).stem}.rejects.jsonl"


def clean(folder: Path, finished: Sequence[Shard]) -> None:
    """Remove what an earlier run left behind unfinished."""
    kept = {shard.name for shard in finished}
    kept |= {rejects_of(name) for name in kept}
    for path in [*folder.glob("part-*"), *folder.glob(".part-*"), *folder.glob(".manifest*")]:
        if path.name not in kept:
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
) -> Shard:
    """Write one shard and what was rejected of its rows.

    Parameters
    ----------
    numbers : ndarray of int64, shape (n,)
        The rows' numbers in the source.
    texts : list of str, or None
        The texts, where they are to be kept.
    carried : pyarrow.Table or None
        The columns that go along.
    vectors : ndarray, shape (n, d)
        The vectors.
    rejects : list of dict
        Rows that have no vector, each with its number and the reason.
    first, n_read : int
        What of the source it covers.
    """
    partial = folder / f".{name}.tmp"
    listed = folder / f".{rejects_of(name)}.tmp"
    try:
        if kind == "npy":
            with partial.open("wb") as file:
                np.save(file, vectors)
        else:
            _write_table(_table(numbers, texts, carried, vectors), partial, kind)
        if rejects:
            lines = (json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
            listed.write_text("".join(lines), encoding="utf-8")
            _settle(listed, folder / rejects_of(name))
        checksum = sha256_of(partial)
        _settle(partial, folder / name)
    except BaseException:
        # Where a disk is full, what is half written is in the way.
        partial.unlink(missing_ok=True)
        listed.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return Shard(name, first, n_read, len(vectors), checksum)


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


def _settle(partial: Path, whole: Path) -> None:
    """Have a file reach the disk, and give it its name."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    partial.replace(whole)


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
