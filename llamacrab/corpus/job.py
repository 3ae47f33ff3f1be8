"""`embed_corpus`: from a source to a folder of shards, in bounded memory, and resumed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llamacrab import _core
from llamacrab._support.extras import require
from llamacrab._support.versions import __version__
from llamacrab.corpus import exports, files, shards, vectors
from llamacrab.corpus.interrupt import Interrupt
from llamacrab.corpus.manifest import Manifest, Shard
from llamacrab.corpus.progress import Progress
from llamacrab.corpus.sources import BLOCK, Block, Source
from llamacrab.errors import CorpusError, InputError, LlamaError, NumericalError
from llamacrab.llama import Llama
from llamacrab.options import EmbedOptions

# Blocks that are computed while earlier ones are written.
AHEAD = 3


@dataclass(frozen=True)
class Summary:
    """What a job came to.

    Attributes
    ----------
    folder : Path
        Where the shards lie.
    n_rows, n_rejected : int
        Rows in all shards, and rows that were rejected.
    n_resumed : int
        Rows that earlier runs had finished.
    n_shards : int
        Files.
    seconds : float
        What this run took.
    complete : bool
        False after Ctrl-C: start again to go on.
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
    progress: bool = False,
    on_progress: Callable[[dict[str, Any]], Any] | None = None,
) -> Summary:
    """Embed a corpus into a folder of files; call it again to go on where it stopped.

    Parameters
    ----------
    source : path, glob, list of Path, table, dataset, frame, or iterable
        Files of lines (``.txt``, ``.jsonl``) or of values (``.csv``, ``.tsv``), also compressed
        (``.gz``, ``.bz2``, ``.zst``); tables (``.parquet``, ``.arrow``); an Arrow table or dataset;
        a pandas or polars frame; or any iterable of str or dict. It must give the same rows in the
        same order when a job is resumed.
    destination : path
        A folder, made if need be, for this job alone.
    model : Llama, str or os.PathLike, optional
        The model, or its GGUF file; by default all-MiniLM-L6-v2.
    devices : sequence of str, optional
        Where `model` is a file: the devices to put a copy of it on; see `Llama`.
    text : str
        The column or field that holds the text.
    input_format : {"lines", "jsonl", "csv", "tsv", "parquet", "arrow"}, optional
        What the files hold; by default what their names say.
    keep : sequence of str
        Columns that go along into the shards, an id for example.
    keep_text : bool
        Put the texts into the shards too.
    format : {"parquet", "arrow", "npy", "jsonl"}
        Of the shards. All but ``npy``, which holds the vectors alone, have a column ``row``, the
        row's number in the source, and ``embedding``.
    shard_rows : int
        Rows of the source that a shard covers.
    options : EmbedOptions, optional
        How texts become vectors.
    on_error : {"fail", "skip"}
        What to do with a row that cannot be read or embedded: raise, with the shards before it
        kept; or leave it out, and list it with the reason in ``part-*.rejects.jsonl``.
    export : path or sequence of paths
        Files to make of the shards when all are there: a database with the table ``embeddings``
        that ends in ``.duckdb`` or ``.lancedb``, or an index that ends in ``.usearch``, whose
        keys are the column ``row`` (extra ``indexes``).
    overwrite : bool
        Begin anew, whatever the folder holds.
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
        The folder holds another job, the source cannot be read, or a row is wrong.
    InputError, MissingExtraError
        An argument makes no sense, or needs a package that is not installed.
    OSError
        A file cannot be written, for example because the disk is full. What is finished stays.
    """
    began = time.monotonic()
    folder = Path(destination)
    how = options or EmbedOptions()
    if format not in shards.FORMATS:
        raise InputError(f"format must be one of {', '.join(shards.FORMATS)}, not {format!r}")
    if on_error not in ("fail", "skip"):
        raise InputError(f"on_error must be 'fail' or 'skip', not {on_error!r}")
    if shard_rows < 1:
        raise InputError(f"shard_rows must be at least 1, not {shard_rows}")
    taken = {shards.ROW, shards.VECTOR, *([shards.TEXT] if keep_text else [])} & set(keep)
    if taken:
        raise InputError(f"keep: the shards have a column {', '.join(sorted(taken))} of their own")
    targets = [Path(one) for one in ([export] if isinstance(export, (str, PathLike)) else export)]
    for target in targets:
        exports.check(target, format=format, dtype=how.dtype)
    if input_format not in (None, *files.KINDS):
        known = ", ".join(files.KINDS)
        raise InputError(f"input_format must be one of {known}, not {input_format!r}")
    require("pyarrow", extra="corpus")
    reader = Source(source, text=text, keep=tuple(keep), kind=input_format)
    with _loaded(model, devices) as llama:
        job = {
            "source": reader.fingerprint(),
            "text": text,
            "input_format": input_format,
            "keep": list(keep),
            "keep_text": keep_text,
            **vectors.describe(llama, how),
            "format": format,
            "on_error": on_error,
        }
        manifest = _manifest(folder, job, overwrite=overwrite)
        for target in targets:
            manifest.refuse_foreign(target)
        manifest.save(folder)
        run = _Run(
            llama,
            folder,
            manifest,
            reader,
            how=how,
            kind=format,
            shard_rows=shard_rows,
            skip=on_error == "skip",
            keep_text=keep_text,
        )
        n_resumed = manifest.n_read
        n_total = reader.n_rows() if progress or on_progress else None
        told = Progress(n_resumed, n_total, bar=progress, call=on_progress)
        with contextlib.closing(told):
            if not manifest.complete:
                run.go(told)
            if manifest.complete:
                for target in targets:
                    _export(folder, manifest, target)
            told.tell(manifest.n_read, run.n_tokens(), complete=manifest.complete)
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


@contextlib.contextmanager
def _loaded(
    model: Llama | str | PathLike[str] | None, devices: Sequence[str] | None
) -> Iterator[Llama]:
    """Load a model for as long as it is needed, unless it is loaded."""
    if not isinstance(model, Llama):
        with Llama(model, devices=devices) as llama:
            yield llama
        return
    if devices is not None:
        raise InputError("devices are for a model that is given as a file; this one is loaded")
    yield model


def _manifest(folder: Path, job: dict[str, Any], *, overwrite: bool) -> Manifest:
    """Return what is finished of a job in its folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, bool] = {}
    manifest = None
    if overwrite:
        with contextlib.suppress(CorpusError):
            old = Manifest.load(folder)
            made = dict.fromkeys(old.exports if old else (), False)
    else:
        manifest = Manifest.load(folder)
        if manifest is None and any(folder.glob("part-*")):
            raise CorpusError(
                f"{folder} holds shards but no manifest: overwrite it, or take another"
            )
    if manifest is None:
        manifest = Manifest(job, _versions(), exports=made)
    manifest.refuse_other(job, folder)
    manifest.drop_damaged(folder)
    shards.clean(folder, manifest.shards)
    return manifest


class _Run:
    """One run of a job."""

    def __init__(
        self,
        llama: Llama,
        folder: Path,
        manifest: Manifest,
        source: Source,
        *,
        how: EmbedOptions,
        kind: str,
        shard_rows: int,
        skip: bool,
        keep_text: bool,
    ) -> None:
        self._llama = llama
        self._folder = folder
        self._manifest = manifest
        self._source = source
        self._how = how
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
        """Return the tokens that were computed in this run."""
        return self._tokens() - self._tokens_before

    def go(self, told: Progress) -> None:
        """Embed what is left, and write it shard by shard."""
        pending: list[tuple[Block, np.ndarray, np.ndarray]] = []
        with self._interrupt, ThreadPoolExecutor(1, "llamacrab-writer") as writer:
            written: Future[Shard] | None = None

            def write() -> None:
                nonlocal written, pending
                self._take(written)
                written = writer.submit(self._write, pending) if pending else None
                pending = []

            computed = self._computed()
            try:
                for block, rows, done in computed:
                    pending.append((block, rows, done))
                    told.tell(block.first + len(block.texts), self.n_tokens())
                    if sum(len(b.texts) for b, _, _ in pending) >= self._shard_rows:
                        write()
                write()
                self._take(written)
                self._manifest.complete = True
                self._manifest.save(self._folder)
            except (KeyboardInterrupt, LlamaError) as error:
                # What is computed is kept, in a shard that is shorter than the others.
                computed.close()
                write()
                self._take(written)
                if not isinstance(error, KeyboardInterrupt):
                    raise

    def _take(self, written: Future[Shard] | None) -> None:
        """Count a shard in, once its file is there."""
        if written is None:
            return
        try:
            self._manifest.shards.append(written.result())
            self._manifest.save(self._folder)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: cannot write to {self._folder}; {self._manifest.n_read} rows "
                "are finished, start again to go on",
            ) from error

    def _blocks(self) -> Iterator[Block]:
        """Yield what is left of the source, in blocks that do not cross the bounds of shards."""
        start = self._manifest.n_read
        for block in self._source.blocks(start):
            at = 0
            while at < len(block.texts):
                left = self._shard_rows - (block.first + at - start) % self._shard_rows
                size = min(left, self._block_rows(block.first + at - start), len(block.texts) - at)
                yield block.slice(at, at + size)
                at += size

    def _block_rows(self, n_read: int) -> int:
        """Return how many rows take about a second: what Ctrl-C, or a crash, costs at most."""
        return max(64, min(BLOCK, int(n_read / (time.monotonic() - self._began + 1e-9))))

    def _computed(self) -> Generator[tuple[Block, np.ndarray, np.ndarray]]:
        """Yield every block with its rows, and which of them are there."""
        ahead: deque[tuple[Block, Future[np.ndarray]]] = deque()
        try:
            blocks, unreadable = self._blocks(), None
            while True:
                try:
                    block = next(blocks, None)
                except CorpusError as error:  # told of once what was read before it is computed
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
        """Queue a block; what is wrong with it is told when its turn has come, not before."""
        try:
            if not self._skip:
                block.refuse_wrong()
            texts = [text for text in block.texts if text is not None]
            return self._llama.submit(texts, options=self._how)
        except (CorpusError, InputError) as error:
            refused: Future[np.ndarray] = Future()
            refused.set_exception(error)
            return refused

    def _finished(
        self, block: Block, future: Future[np.ndarray]
    ) -> tuple[Block, np.ndarray, np.ndarray]:
        """Wait for a block's rows; where a text of it is refused, for those of the others."""
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
        """Embed what can be embedded of a block, and note what is wrong with the rest."""
        kept = []
        for i in places:
            try:
                kept.append(self._llama.embed(block.texts[i], options=self._how))
            except (InputError, NumericalError) as wrong:
                reason = str(wrong).replace("text 0", "the text", 1)
                if not self._skip:
                    row = block.first + int(i)
                    raise CorpusError(f"row {row}: {reason}", row=row) from wrong
                block.reasons[int(i)] = reason
        if kept:
            return np.stack(kept)
        return self._llama.embed_texts([], options=self._how)

    def _write(self, blocks: list[tuple[Block, np.ndarray, np.ndarray]]) -> Shard:
        done = np.concatenate([one for _, _, one in blocks])
        first = blocks[0][0].first
        texts = [text for block, _, _ in blocks for text in block.texts]
        carried = None
        if blocks[0][0].carried is not None:
            pa = require("pyarrow", extra="corpus")
            tables = [block.carried for block, _, _ in blocks]
            carried = pa.concat_tables(tables, promote_options="default").filter(pa.array(done))
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
        )


def _versions() -> dict[str, str]:
    return {
        "llamacrab": __version__,
        "llama.cpp": _core.build_info()["commit"],
        "numpy": np.__version__,
        "pyarrow": importlib.metadata.version("pyarrow"),
    }


def _export(folder: Path, manifest: Manifest, target: Path) -> None:
    """Make a file of the shards, unless that has been done."""
    name = str(target.absolute())
    if manifest.exports.get(name) and target.exists():
        return
    manifest.exports[name] = False  # from now on, what lies there is this job's to replace
    manifest.save(folder)
    exports.write(folder, [shard.name for shard in manifest.shards], target)
    manifest.exports[name] = True
    manifest.save(folder)
