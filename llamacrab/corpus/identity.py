"""The identity of a job: everything that its embeddings depend on, and a hash of its rows.

A run may continue the work of an earlier run with the same identity. Settings that change only the
speed (contexts, threads, tokens per pack, rows per shard) are not part of it. Neither is flash
attention: it changes embeddings by less than the other texts of a pack may.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._support.extras import require
from llamacrab._support.files import model_hashes
from llamacrab.corpus.sources import Block, Source
from llamacrab.errors import CorpusError

if TYPE_CHECKING:
    import threading

    from llamacrab.corpus.manifest import Shard
    from llamacrab.llama import Llama
    from llamacrab.options import EmbedOptions


def identity(
    llama: Llama, source: Source, options: EmbedOptions, stop: threading.Event, **job_options: Any
) -> dict[str, Any]:
    """Return the identity of a job for its manifest; reads all files of the model and source."""
    # n_ctx matters only if texts that are too long are cut, split or left out.
    limited = options.truncate or options.chunk or job_options["on_error"] == "skip"
    job = {
        "source": source.fingerprint(stop),
        **describe(llama, options, stop),
        "n_ctx": llama.n_ctx if limited else None,
        "backends": llama.backends,
        "deterministic": llama.deterministic,
        "prompt": llama.prompts.get(options.prompt_name or ""),
        **job_options,
    }
    return dict(json.loads(json.dumps(job)))  # as it is after reading the manifest


def describe(
    llama: Llama, options: EmbedOptions, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Return the model, pooling and options that make embeddings comparable, as JSON values."""
    ranges = None if options.ranges is None else np.asarray(options.ranges).tolist()
    return {
        "model": model_hashes(Path(llama.model.path), stop),
        "pooling_type": llama.pooling_type.name,
        "options": {**asdict(replace(options, ranges=None)), "ranges": ranges},
    }


def may_have_grown(before: Any, now: Any) -> bool:
    """Return whether the files may be the earlier ones with rows added at the end."""
    if not isinstance(before, list) or not isinstance(now, list) or len(now) < len(before):
        return False
    pairs = zip(before, now, strict=False)
    return all(old[0] == new[0] and old[1] <= new[1] for old, new in pairs)


def difference(before: Any, now: Any) -> str:
    """Describe how the files of two sources differ."""
    if not isinstance(before, list) or not isinstance(now, list):
        return f"{_kind(before)} there, {_kind(now)} now"
    if len(before) != len(now):
        return f"{len(before)} files there, {len(now)} now"
    for (old, size, _), new in zip(before, now, strict=True):
        if [old, size] != new[:2]:
            return f"{old} with {size:,} bytes there, {new[0]} with {new[1]:,} now"
    changed = [old[0] for old, new in zip(before, now, strict=True) if old != new]
    return f"{', '.join(changed)}: other content than there, of the same length"


def _kind(source: Any) -> str:
    return "rows from Python" if source is None else "files"


class RowsHash:
    """A hash of the texts and kept values of rows.

    A row that cannot be read counts as a row without a text: the wording of the reason may differ
    between versions of Python.
    """

    def __init__(self) -> None:
        self._digest = require("xxhash", extra="corpus").xxh3_128()

    def update(self, block: Block) -> None:
        """Add rows."""
        records = [_record(text) for text in block.texts]
        if block.carried is not None:
            rows = [_record(_as_text(row)) for row in block.carried.to_pylist()]
            records = [text + row for text, row in zip(records, rows, strict=True)]
        self._digest.update(b"".join(records))

    def hexdigest(self) -> str:
        """Return the hash of all rows so far; it does not depend on the blocks."""
        return str(self._digest.hexdigest())


def _record(text: str | None) -> bytes:
    if text is None:
        return b"-"
    data = text.encode("utf-8", "surrogatepass")  # halves of surrogate pairs raise later
    return b"%d %b" % (len(data), data)


def _as_text(row: dict[str, Any]) -> str:
    """Return values as text, 1.0 like 1: a later row may have turned a column into floats."""
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in row.values()]
    return json.dumps(values, default=str)


class Finished:
    """Compares the rows of a source with the rows of finished shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._left = deque(shards)
        self._rows = RowsHash()

    def rest_of(self, block: Block) -> Block:
        """Check the finished part of a block, and return the rest, which may be empty.

        Raises
        ------
        CorpusError
            The rows differ.
        """
        at = 0
        while self._left and at < len(block.texts):
            shard = self._left[0]
            end = shard.first + shard.n_read
            size = min(len(block.texts) - at, end - block.first - at)
            self._rows.update(block.slice(at, at + size))
            at += size
            if block.first + at == end:
                if self._rows.hexdigest() != shard.rows:
                    raise CorpusError(
                        f"rows {shard.first} to {end - 1} of the source are not the rows of "
                        f"{shard.name}: give the same rows in the same order, or "
                        "overwrite the job"
                    )
                self._left.popleft()
                self._rows = RowsHash()
        return block.slice(at, len(block.texts))

    def end(self, n_rows: int) -> None:
        """Raise if a source of `n_rows` rows is shorter than the finished part."""
        if self._left:
            last = self._left[-1]
            raise CorpusError(
                f"the source has {n_rows} rows, but {last.first + last.n_read} are finished: give "
                "the same rows in the same order, or overwrite the job"
            )
