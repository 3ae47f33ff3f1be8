"""`embed_corpus`: embed a source into a folder of shards, in bounded memory; resumable."""

from __future__ import annotations

import contextlib
import importlib.metadata
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llamacrab import _core
from llamacrab._support.extras import require
from llamacrab._support.files import settle, sha256_of
from llamacrab._support.versions import __version__
from llamacrab.corpus import exports, files, lock, shards
from llamacrab.corpus.identity import Finished, RowsHash, identity
from llamacrab.corpus.interrupt import Interrupt
from llamacrab.corpus.manifest import Manifest, Shard
from llamacrab.corpus.progress import Progress
from llamacrab.corpus.sources import BLOCK, Block, Source
from llamacrab.errors import CorpusError, InputError, LlamaError, NumericalError
from llamacrab.llama import Llama
from llamacrab.options import EmbedOptions

# Number of blocks that are computed while earlier ones are written.
AHEAD = 3


@dataclass(frozen=True)
class Summary:
    """The result of a run of `embed_corpus`.

    Attributes
    ----------
    folder : Path
        The folder of the shards.
    n_rows, n_rejected : int
        Rows in all shards, and rows that were rejected.
    n_resumed : int
        Rows that earlier runs had finished.
    n_shards : int
        Number of shards.
    seconds : float
        Duration of this run.
    complete : bool
        False after Ctrl-C: call again to resume.
    """

    folder: Path
    n_rows: int
    n_rejected: int
    n_resumed: int
    n_shards: int
    seconds: float
    complete: bool


def embed_corpus(
    source: Any,
    destination: str | PathLike[str],
    model: Llama | str | PathLike[str] | None = None,
    *,
    devices: Sequence[str] | None = None,
    text: str = "text",
    input_format: str | None = None,
    keep: Sequence[str] = (),
    keep_text: bool = False,
    format: Literal["parquet", "arrow", "npy", "jsonl"] = "parquet",
    shard_rows: int = 65_536,
    options: EmbedOptions | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    export: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    overwrite: bool = False,
    append: bool = False,
    progress: bool = False,
    on_progress: Callable[[dict[str, Any]], Any] | None = None,
) -> Summary:
    """Embed a corpus into a folder of files. Call it again to resume an interrupted job.

    Parameters
    ----------
    source : path, glob, list of Path, table, dataset, frame, or iterable
        Files of lines (``.txt``, ``.jsonl``) or of values (``.csv``, ``.tsv``), also compressed
        (``.gz``, ``.bz2``, ``.zst``); tables (``.parquet``, ``.arrow``); an Arrow table or dataset;
        a pandas or polars frame; or any iterable of str or dict. It must give the same rows in the
        same order when a job is resumed.
    destination : path
        A folder for this job only; it is made if it does not exist.
    model : Llama, str or os.PathLike, optional
        The model, or its GGUF file; by default all-MiniLM-L6-v2.
    devices : sequence of str, optional
        If `model` is a file: the devices to put a copy of it on; see `Llama`.
    text : str
        The column or field that holds the text.
    input_format : {"lines", "jsonl", "csv", "tsv", "parquet", "arrow"}, optional
        What the files hold; by default what their names say.
    keep : sequence of str
        Columns to copy into the shards, for example an id. Each has one type in all shards: the
        narrowest one that holds all its values.
    keep_text : bool
        Write the texts into the shards too.
    format : {"parquet", "arrow", "npy", "jsonl"}
        Format of the shards. They have the columns ``row``, the number of the row in the source,
        and ``embedding``; ``npy`` holds only the embeddings.
    shard_rows : int
        Rows of the source per shard.
    options : EmbedOptions, optional
        How texts become embeddings.
    on_error : {"fail", "skip"}
        What to do with a row that cannot be read or embedded, or has a value that does not fit the
        type of its column. "fail" raises, and keeps the shards before it; "skip" leaves the row
        out, and lists it with the reason in ``part-*.rejects.jsonl``.
    export : path or sequence of paths
        Files to make from the shards when the job is complete (extra ``indexes``): a database with
        the table ``embeddings`` if the name ends in ``.duckdb`` or ``.lancedb``, or an index if it
        ends in ``.usearch``, whose keys are the column ``row``.
    overwrite : bool
        Start again from the first row: the shards that the folder's manifest lists are removed.
    append : bool
        Embed the rows that were added at the end of the source after the job was complete. The
        other rows must not have changed; they are read and compared.
    progress : bool
        Show a progress bar (extra ``progress``).
    on_progress : callable, optional
        Called with a dict after every block and at the end.

    Returns
    -------
    Summary

    Raises
    ------
    CorpusError
        The folder holds another job, or another process uses it; the source cannot be read, or has
        changed; or a row is wrong.
    InputError, MissingExtraError
        An argument is wrong, or needs a package that is not installed.
    OSError
        A file cannot be written, for example because the disk is full. Finished shards stay.
    """
    began = time.monotonic()
    folder = Path(destination)
    options = options or EmbedOptions()
    targets = [Path(one) for one in ([export] if isinstance(export, (str, PathLike)) else export)]
    _check_arguments(
        format=format,
        on_error=on_error,
        shard_rows=shard_rows,
        keep=keep,
        keep_text=keep_text,
        input_format=input_format,
    )
    for target in targets:
        exports.check(target, format=format, dtype=options.dtype)
    if overwrite and append:
        raise InputError("overwrite and append exclude each other")
    require("pyarrow", extra="corpus")
    reader = Source(source, text=text, keep=tuple(keep), kind=input_format)
    folder.mkdir(parents=True, exist_ok=True)
    with lock.held(folder), _loaded(model, devices) as llama, _background() as (pool, stop):
        # Files are hashed while the first rows are computed.
        job = pool.submit(
            identity,
            llama,
            reader,
            options,
            stop,
            text=text,
            input_format=input_format,
            keep=list(keep),
            keep_text=keep_text,
            format=format,
            on_error=on_error,
        )
        manifest = _manifest(folder, job, overwrite=overwrite, append=append)
        for target in targets:
            manifest.refuse_foreign(target)
        run = _Run(
            llama,
            folder,
            manifest,
            reader,
            job,
            options=options,
            kind=format,
            shard_rows=shard_rows,
            skip=on_error == "skip",
            keep_text=keep_text,
            append=append,
        )
        n_resumed = manifest.n_read
        n_total = reader.n_rows() if progress or on_progress else None
        reporter = Progress(n_resumed, n_total, bar=progress, call=on_progress)
        with contextlib.closing(reporter):
            if not manifest.complete or manifest.job != job.result() or not reader.has_files:
                run.go(reporter)
            if manifest.complete:
                for target in targets:
                    _export(folder, manifest, target)
            reporter.report(manifest.n_read, run.n_tokens(), complete=manifest.complete)
    n_rows = sum(shard.n_rows for shard in manifest.shards)
    return Summary(
        folder,
        n_rows,
        manifest.n_read - n_rows,
        n_resumed,
        len(manifest.shards),
        time.monotonic() - began,
        manifest.complete,
    )


def _check_arguments(
    *,
    format: str,
    on_error: str,
    shard_rows: int,
    keep: Sequence[str],
    keep_text: bool,
    input_format: str | None,
) -> None:
    if format not in shards.FORMATS:
        raise InputError(f"format must be one of {', '.join(shards.FORMATS)}, not {format!r}")
    if on_error not in ("fail", "skip"):
        raise InputError(f"on_error must be 'fail' or 'skip', not {on_error!r}")
    if shard_rows < 1:
        raise InputError(f"shard_rows must be at least 1, not {shard_rows}")
    taken = {shards.ROW, shards.VECTOR, *([shards.TEXT] if keep_text else [])} & set(keep)
    if taken:
        raise InputError(f"keep: the shards have a column {', '.join(sorted(taken))} of their own")
    if input_format not in (None, *files.KINDS):
        known = ", ".join(files.KINDS)
        raise InputError(f"input_format must be one of {known}, not {input_format!r}")


@contextlib.contextmanager
def _loaded(
    model: Llama | str | PathLike[str] | None, devices: Sequence[str] | None
) -> Iterator[Llama]:
    """Load a model, and close it at the end; use a `Llama` as it is."""
    if not isinstance(model, Llama):
        with Llama(model, devices=devices) as llama:
            yield llama
        return
    if devices is not None:
        raise InputError("devices= is for a model that is given as a file; this one is loaded")
    yield model


@contextlib.contextmanager
def _background() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Run a thread for one task, and an event that stops it, which is set at the end."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, "llamacrab-identity") as pool:
        try:
            yield pool, stop
        finally:
            stop.set()


def _manifest(
    folder: Path, job: Future[dict[str, Any]], *, overwrite: bool, append: bool
) -> Manifest:
    """Return the manifest of a folder's finished shards, and remove unfinished files."""
    try:
        manifest = Manifest.load(folder) or Manifest()
    except CorpusError:
        if not overwrite:
            raise
        manifest = Manifest()  # its shards are not known: their files will raise in `clean`
    unfinished = [manifest.writing] if manifest.writing else []
    if manifest.shards and not overwrite:
        manifest.refuse_other(job.result(), folder, append=append)
        unfinished += manifest.keep(manifest.n_sound(folder))
    else:  # without finished shards, another job may start
        unfinished += manifest.keep(0)
        manifest = Manifest(exports=dict.fromkeys(manifest.exports, False))
    shards.clean(folder, manifest.shards, unfinished)
    if unfinished:
        manifest.writing = None
        manifest.save(folder)
    return manifest


class _Run:
    """One run of a job."""

    def __init__(
        self,
        llama: Llama,
        folder: Path,
        manifest: Manifest,
        source: Source,
        job: Future[dict[str, Any]],
        *,
        options: EmbedOptions,
        kind: str,
        shard_rows: int,
        skip: bool,
        keep_text: bool,
        append: bool,
    ) -> None:
        self._llama = llama
        self._folder = folder
        self._manifest = manifest
        self._source = source
        self._job = job
        self._may_grow = append or not manifest.complete
        self._options = options
        self._kind = kind
        self._shard_rows = shard_rows
        self._skip = skip
        self._keep_text = keep_text
        self._tokens_before = self._tokens()
        self._interrupt = Interrupt()
        self._began = time.monotonic()

    def _tokens(self) -> int:
        return sum(int(worker["tokens"]) for worker in self._llama.stats()["workers"])

    def n_tokens(self) -> int:
        """Return the number of tokens that this run has computed."""
        return self._tokens() - self._tokens_before

    def go(self, reporter: Progress) -> None:
        """Embed the remaining rows, and write them shard by shard."""
        pending: list[tuple[Block, np.ndarray, np.ndarray]] = []
        with self._interrupt, ThreadPoolExecutor(1, "llamacrab-writer") as writer:
            written: Future[Shard] | None = None

            def next_shard() -> None:
                """Add the shard that was being written, and start to write the next one."""
                nonlocal written, pending
                self._count(written, more=bool(pending))
                written = writer.submit(self._write, pending) if pending else None
                pending = []

            computed = self._computed()
            try:
                for block, rows, done in computed:
                    pending.append((block, rows, done))
                    reporter.report(block.first + len(block.texts), self.n_tokens())
                    if sum(len(b.texts) for b, _, _ in pending) >= self._shard_rows:
                        next_shard()
                next_shard()
                next_shard()
                self._complete()
            except (KeyboardInterrupt, LlamaError) as error:
                # Keep the computed rows, in a shard that is shorter than the others.
                computed.close()
                next_shard()
                next_shard()
                if not isinstance(error, KeyboardInterrupt):
                    raise

    def _count(self, written: Future[Shard] | None, *, more: bool) -> None:
        """Add a shard to the manifest when its file is written, and record the next one."""
        if written is None and not more:
            return
        manifest = self._manifest
        job = self._identity()
        try:
            if written is not None:
                manifest.count(written.result())
            if more:
                manifest.reopen()
                manifest.writing = shards.name_of(len(manifest.shards), self._kind)
            manifest.job, manifest.made_with = job, manifest.made_with or _versions()
            manifest.save(self._folder)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: cannot write to {self._folder}; {manifest.n_read} rows "
                "are finished, start again to resume",
            ) from error

    def _identity(self) -> dict[str, Any]:
        """Return the identity of the job; a first run starts before it is known."""
        if self._job.done():
            return self._job.result()
        with self._interrupt.allowed():
            return self._job.result()

    def _complete(self) -> None:
        """Mark the job as complete, after the source was read to its end."""
        manifest = self._manifest
        job = self._identity()
        self._source.refuse_changed()
        if self._source.columns.widened and self._kind in ("parquet", "arrow"):
            self._recast()
        manifest.job, manifest.made_with = job, manifest.made_with or _versions()
        manifest.complete = True
        manifest.save(self._folder)

    def _recast(self) -> None:
        """Give the columns of all shards the final types."""
        manifest, folder = self._manifest, self._folder
        for k, shard in enumerate(manifest.shards):
            with self._interrupt.allowed():
                pass
            partial = shards.recast(folder, shard.name, self._source.columns.types)
            if partial is None:
                continue
            # After a crash the file is the old or the new one: the manifest has both checksums.
            checksum = sha256_of(partial)
            manifest.recast[shard.name] = checksum
            manifest.save(folder)
            settle(partial, folder / shard.name)
            manifest.shards[k] = replace(shard, sha256=checksum)
        manifest.recast = {}

    def _blocks(self) -> Iterator[Block]:
        """Yield the remaining rows, in blocks that do not cross the bounds of shards.

        Finished rows are read too, to compare them.
        """
        start, n_rows = self._manifest.n_read, 0
        finished = Finished(self._manifest.shards)
        for whole in self._source.blocks(0):
            n_rows += len(whole.texts)
            block = finished.rest_of(whole)
            if block.texts and not self._may_grow:
                raise CorpusError(
                    f"the source has more rows than the {start} finished ones: append=True "
                    "(--append) embeds them"
                )
            at = 0
            while at < len(block.texts):
                left = self._shard_rows - (block.first + at - start) % self._shard_rows
                size = min(left, self._block_rows(block.first + at - start), len(block.texts) - at)
                yield block.slice(at, at + size)
                at += size
        finished.end(n_rows)

    def _block_rows(self, n_read: int) -> int:
        """Return how many rows take about a second: the most that Ctrl-C or a crash can lose."""
        return max(64, min(BLOCK, int(n_read / (time.monotonic() - self._began + 1e-9))))

    def _computed(self) -> Generator[tuple[Block, np.ndarray, np.ndarray]]:
        """Yield every block with its rows, and which of them were computed."""
        ahead: deque[tuple[Block, Future[np.ndarray]]] = deque()
        try:
            blocks, unreadable = self._blocks(), None
            while True:
                try:
                    with self._interrupt.allowed():
                        block = next(blocks, None)
                except CorpusError as error:  # raised after the rows before it are computed
                    block, unreadable = None, error
                if block is None:
                    break
                ahead.append((block, self._submitted(block)))
                if len(ahead) >= AHEAD:
                    yield self._finished(*ahead.popleft())
            while ahead:
                yield self._finished(*ahead.popleft())
            if unreadable is not None:
                raise unreadable
        finally:
            for _, future in ahead:
                future.cancel()

    def _submitted(self, block: Block) -> Future[np.ndarray]:
        """Queue a block. The returned future raises its error, after the blocks before it."""
        try:
            if not self._skip:
                block.refuse_wrong()
            texts = [text for text in block.texts if text is not None]
            return self._llama.submit(texts, options=self._options)
        except (CorpusError, InputError) as error:
            refused: Future[np.ndarray] = Future()
            refused.set_exception(error)
            return refused

    def _finished(
        self, block: Block, future: Future[np.ndarray]
    ) -> tuple[Block, np.ndarray, np.ndarray]:
        """Wait for the rows of a block; if a text raises, for the rows of the other texts."""
        places = np.flatnonzero([text is not None for text in block.texts])
        done = np.zeros(len(block.texts), dtype=bool)
        rows: np.ndarray | None = None
        try:
            with self._interrupt.allowed():
                found = future.result()
        except (InputError, NumericalError):
            found = self._one_by_one(block, places)
            places = places[[i not in block.reasons for i in places]]
        rows = np.zeros((len(block.texts), found.shape[1]), dtype=found.dtype)
        rows[places] = found
        done[places] = True
        return block, rows, done

    def _one_by_one(self, block: Block, places: np.ndarray) -> np.ndarray:
        """Embed the texts of a block one by one, and record the reason for each that raises."""
        kept = []
        for i in places:
            try:
                with self._interrupt.allowed():
                    kept.append(self._llama.embed(block.texts[i], options=self._options))
            except (InputError, NumericalError) as wrong:
                reason = str(wrong).replace("text 0", "the text", 1)
                if not self._skip:
                    row = block.first + int(i)
                    raise CorpusError(f"row {row}: {reason}", row=row) from wrong
                block.reasons[int(i)] = reason
        if kept:
            return np.stack(kept)
        return self._llama.embed_texts([], options=self._options)

    def _write(self, blocks: list[tuple[Block, np.ndarray, np.ndarray]]) -> Shard:
        done = np.concatenate([one for _, _, one in blocks])
        first = blocks[0][0].first
        texts = [text for block, _, _ in blocks for text in block.texts]
        rows_hash = RowsHash()
        for block, _, _ in blocks:
            rows_hash.update(block)
        carried = None
        if blocks[0][0].carried is not None:
            pa = require("pyarrow", extra="corpus")
            tables = [block.carried for block, _, _ in blocks]
            carried = pa.concat_tables(tables, promote_options="permissive").filter(pa.array(done))
        return shards.write(
            self._folder,
            shards.name_of(len(self._manifest.shards), self._kind),
            self._kind,
            np.flatnonzero(done) + first,
            [texts[i] or "" for i in np.flatnonzero(done)] if self._keep_text else None,
            carried,
            np.concatenate([rows for _, rows, _ in blocks])[done],
            [
                {"row": block.first + i, "reason": why}
                for block, _, _ in blocks
                for i, why in sorted(block.reasons.items())
            ],
            first=first,
            n_read=len(done),
            rows=rows_hash.hexdigest(),
        )


def _versions() -> dict[str, str]:
    return {
        "llamacrab": __version__,
        "llama.cpp": _core.build_info()["commit"],
        "numpy": np.__version__,
        "pyarrow": importlib.metadata.version("pyarrow"),
    }


def _export(folder: Path, manifest: Manifest, target: Path) -> None:
    """Export the shards to a file, unless that was done already."""
    name = str(target.absolute())
    if manifest.exports.get(name) and target.exists():
        return
    manifest.refuse_foreign(target)  # it may have been created since the first check
    manifest.exports[name] = False  # from now on, this job may replace the file
    manifest.save(folder)
    exports.write(folder, [shard.name for shard in manifest.shards], target)
    manifest.exports[name] = True
    manifest.save(folder)
