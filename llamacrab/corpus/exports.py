"""Export the shards of a finished job to one database or index.

It is written under a temporary name and renamed at the end, so it is always complete. An export
that was interrupted is made again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._support.extras import require
from llamacrab._support.files import sync_folder, sync_tree
from llamacrab.corpus import shards
from llamacrab.errors import CorpusError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE = "embeddings"
# Rows that are read at once.
BATCH = 16_384
# Our dtypes as usearch calls them.
USEARCH_TYPES = {"float32": "f32", "float16": "f16", "ubinary": "b1"}


def check(path: Path, *, format: str, dtype: str) -> None:
    """Raise, before any work is done, if an export is not possible.

    Raises
    ------
    InputError
        The kind of file is not known, or does not support the format or dtype.
    MissingExtraError
        A package is not installed.
    """
    if path.suffix not in _WRITERS:
        raise InputError(
            f"cannot export to {path}: its name must end in one of {', '.join(_WRITERS)}"
        )
    if format not in ("parquet", "arrow"):
        raise InputError(f"shards in {format} cannot be exported; take format='parquet'")
    package = _WRITERS[path.suffix][0]
    require(package, extra="indexes")
    if package == "usearch" and dtype not in USEARCH_TYPES:
        raise InputError(f"usearch takes dtype {', '.join(USEARCH_TYPES)}, not {dtype!r}")


def write(folder: Path, files: list[str], path: Path) -> None:
    """Export the rows of these shards to `path`, and replace an earlier export."""
    pa_dataset = require("pyarrow.dataset", extra="corpus")
    kind = "ipc" if files and files[0].endswith(shards.FORMATS["arrow"]) else "parquet"
    rows = pa_dataset.dataset([folder / name for name in files], format=kind)
    # One temporary name per job: the next run of the job removes the file of a killed run.
    owner = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    partial = path.with_name(f".{path.name}.{owner}.tmp{path.suffix}")
    _remove(partial)
    try:
        _WRITERS[path.suffix][1](rows, partial)
        sync_tree(partial)
        if partial.is_dir() or path.is_dir():  # a folder cannot replace another one
            _remove(path)
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_duckdb(rows: Any, path: Path) -> None:
    with require("duckdb", extra="indexes").connect(str(path)) as database:
        database.register("rows", rows)
        database.execute(f"CREATE TABLE {TABLE} AS SELECT * FROM rows")


def _write_lancedb(rows: Any, path: Path) -> None:
    database = require("lancedb", extra="indexes").connect(str(path))
    database.create_table(TABLE, data=_batches(rows), schema=rows.schema)


def _write_usearch(rows: Any, path: Path) -> None:
    index = None
    for batch in _batches(rows):
        vectors = batch.column(shards.VECTOR)
        width = vectors.type.list_size
        array = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        if index is None:
            index = _usearch_index(width, array.dtype)
        index.add(batch.column(shards.ROW).to_numpy(), array)
    if index is None:
        raise CorpusError("there are no rows to make an index of")
    index.save(str(path))


def _usearch_index(width: int, dtype: np.dtype) -> Any:
    make = require("usearch.index", extra="indexes").Index
    if dtype == np.uint8:  # bits, eight in each
        return make(ndim=8 * width, metric="hamming", dtype="b1")
    return make(ndim=width, metric="cos", dtype=USEARCH_TYPES[str(dtype)])


def _batches(rows: Any) -> Iterator[Any]:
    for batch in rows.to_batches(batch_size=BATCH):
        if batch.num_rows:
            yield batch


_WRITERS = {
    ".duckdb": ("duckdb", _write_duckdb),
    ".lancedb": ("lancedb", _write_lancedb),
    ".usearch": ("usearch", _write_usearch),
}
