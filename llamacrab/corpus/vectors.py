"""Read the embeddings that `llamacrab embed` wrote, and the record of how they were made.

For a folder the record is its manifest. For a file it is a second file, with ``.json`` added to the
name, as .npy and lines of JSON have no place for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llamacrab._core import PoolingType
from llamacrab._support.extras import require
from llamacrab._support.fetch import sha256_of
from llamacrab._support.files import write_whole
from llamacrab._support.versions import __version__
from llamacrab.corpus import shards
from llamacrab.corpus.identity import describe
from llamacrab.corpus.manifest import Manifest, Shard
from llamacrab.errors import CorpusError
from llamacrab.similarity import semantic_search, semantic_search_binary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeAlias

    from llamacrab.llama import Llama
    from llamacrab.options import EmbedOptions

    # Embeddings, their row numbers in the source, and their texts if those were kept.
    Part: TypeAlias = tuple[np.ndarray, np.ndarray, list[str] | None]

VERSION = 1
BITS = ("binary", "ubinary")
# Types of lists of numbers in JSON; all others are read as float32.
_JSON_DTYPES = {"binary": np.int8, "ubinary": np.uint8}


def prompt_of(llama: Llama, options: dict[str, Any]) -> str:
    """Return the prompt that these options put before every text."""
    name = options["prompt_name"]
    if name is not None and name not in llama.prompts:
        raise CorpusError(f"the embeddings had the prompt {name!r}, which this model lacks")
    return options["prompt"] or ("" if name is None else llama.prompts[name])


def write(
    path: Path, texts: Sequence[str], rows: np.ndarray, llama: Llama, options: EmbedOptions
) -> None:
    """Write embeddings to .npy or .jsonl atomically, and the record of how they were made."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, rows)
            else:
                write_lines(file, texts, rows)
        made = describe(llama, options)
        record = {
            "version": VERSION,
            "llamacrab": __version__,
            "sha256": sha256_of(partial),
            "texts_sha256": _hash(texts),
            "model_file": Path(llama.model.path).name,
            "made": {**made, "prompt": prompt_of(llama, made["options"])},
        }
        # After a crash between the two, the record describes another file; its checksum shows that.
        partial.replace(path)
        write_whole(_record_path(path), json.dumps(record, indent=1, ensure_ascii=False).encode())
    finally:
        partial.unlink(missing_ok=True)


def write_lines(stream: BinaryIO, texts: Iterable[str], rows: np.ndarray) -> None:
    """Write one JSON object per line: a text and its embedding."""
    for text, row in zip(texts, rows.tolist(), strict=True):
        line = json.dumps({shards.TEXT: text, shards.VECTOR: row}, ensure_ascii=False)
        stream.write(line.encode() + b"\n")


class Vectors:
    """Embeddings on disk.

    Parameters
    ----------
    path : Path
        A .npy or .jsonl file, or a folder of shards.

    Attributes
    ----------
    made : dict or None
        How they were made, as `describe` returns it, and maybe ``prompt``; None: not recorded.

    Raises
    ------
    CorpusError
        It has another format, is damaged, or is not finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: dict[str, Any] | None = None
        self._n_rows: int | None = None  # of the source, if known before they are read
        self._texts_hash: str | None = None
        self._model_file = ""
        self._read: list[Callable[[], Part]] = []
        self._numbers: list[np.ndarray] = []
        if path.is_dir():
            self._open_folder()
        elif path.suffix in (".npy", ".jsonl"):
            self._open_file()
        else:
            raise CorpusError(f"{path}: not an output of embed, which is .npy, .jsonl, or a folder")

    def _open_folder(self) -> None:
        manifest = Manifest.load(self.path)
        if manifest is None:
            raise CorpusError(f"{self.path} has no manifest.json: embed did not write this folder")
        if (n_sound := manifest.n_sound(self.path)) < len(manifest.shards):
            damaged = self.path / manifest.shards[n_sound].name
            raise CorpusError(
                f"{damaged} is damaged or missing: run the same embed again to replace it"
            )
        if not manifest.complete:
            raise CorpusError(
                f"{self.path} is not finished, it covers {manifest.n_read} rows: start the same "
                "embed again to resume"
            )
        self.made = manifest.job
        self._n_rows = manifest.n_read
        self._read = [
            functools.partial(_read_shard, self.path, shard, manifest.job)
            for shard in manifest.shards
        ]

    def _open_file(self) -> None:
        record_path = _record_path(self.path)
        if record_path.is_file():
            try:
                record = json.loads(record_path.read_text(encoding="utf-8"))
                version, self.made = record["version"], record["made"]
                sha256, self._texts_hash = record["sha256"], record["texts_sha256"]
                self._model_file = record["model_file"]
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(f"{record_path} is damaged: {error!r}; {_AGAIN}") from None
            if version != VERSION:
                raise CorpusError(f"{record_path} was written by another version of llamacrab")
            if sha256 != sha256_of(self.path):
                raise CorpusError(
                    f"{record_path} does not describe {self.path.name}, which was changed: {_AGAIN}"
                )
        read = _read_npy if self.path.suffix == ".npy" else _read_jsonl
        self._read = [functools.partial(read, self.path, self.dtype)]

    @property
    def dtype(self) -> str:
        """The dtype of the embeddings; float32 if not recorded."""
        return "float32" if self.made is None else str(self.made["options"]["dtype"])

    @property
    def pooling_type(self) -> PoolingType:
        """The pooling of the embeddings; UNSPECIFIED if not recorded."""
        return PoolingType[self.made["pooling_type"] if self.made else "UNSPECIFIED"]

    def search(
        self, query: np.ndarray, texts: Sequence[str | None], *, top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and the row numbers of the texts that are nearest to a query.

        Scores are cosines; for binary embeddings, dot products of the query with their bits.
        """
        bits = self.dtype in BITS
        rows = self.blocks(texts, -(-len(query) // 8) if bits else len(query))
        nearest = semantic_search_binary if bits else semantic_search
        scores, indices = nearest(query, rows, top_k=top_k)
        numbers = np.concatenate([np.empty(0, np.int64), *self._numbers])
        return scores, numbers[indices]

    def query_options(self, llama: Llama, options: EmbedOptions) -> EmbedOptions:
        """Return options for a query that make it comparable with these embeddings.

        Parameters
        ----------
        llama : Llama
            The model for the query.
        options : EmbedOptions
            Options of the caller; their prompt overrides that of the model.

        Raises
        ------
        CorpusError
            They were made with another model, or with a prompt for which no query prompt is known.
        """
        query = options
        if options.prompt is None and options.prompt_name is None and "query" in llama.prompts:
            query = replace(options, prompt_name="query")
        wanted = llama.prompts.get("document", "")
        if self.made is None:
            if wanted and query is not options:
                warnings.warn(
                    f"the prompt of the documents of {self.path} is not recorded: the query is "
                    f"compared as if it had been {wanted!r}",
                    stacklevel=2,
                )
            return query
        made_options = self.made["options"]
        if self.made["model"] != describe(llama, options)["model"]:
            raise CorpusError(
                f"{self.path} was made with another model"
                f"{self._model_file and f' ({self._model_file})'} than {llama.model.path}"
            )
        if self.dtype in ("int8", "uint8"):
            raise CorpusError(f"{self.path} holds {self.dtype}: search does not support this type")
        kept = {name: made_options[name] for name in ("dimensions", "start_token", "end_token")}
        options, query = replace(options, **kept), replace(query, **kept)
        had = self.made.get("prompt")
        had = prompt_of(llama, made_options) if had is None else had
        if had == wanted or options.prompt is not None or options.prompt_name is not None:
            return query
        if had:
            raise CorpusError(
                f"{self.path} was made with {had!r} before every text, which is not the model's "
                f"prompt for documents ({wanted!r}): say what to put before the query, with "
                "prompt or prompt_name (--prompt, --prompt-name)"
            )
        warnings.warn(
            f"{self.path} was made without the model's prompts, so none is put before the query; "
            f"the model was trained to see {wanted!r} before documents "
            "(embed --prompt-name document)",
            stacklevel=2,
        )
        return options

    def blocks(self, texts: Sequence[str | None], width: int) -> Iterator[np.ndarray]:
        """Yield the embeddings of these texts, after checking that they belong to them.

        Parameters
        ----------
        texts : sequence of str or None
            The rows of the source; None: a row without a text.
        width : int
            Numbers, or bytes, per embedding.

        Raises
        ------
        CorpusError
            The number of texts, a text, or the width differs.
        """
        known = (text for text in texts if text is not None)
        changed = self._texts_hash is not None and self._texts_hash != _hash(known)
        if self._n_rows is not None and self._n_rows != len(texts):
            raise CorpusError(
                f"{self.path} covers {self._n_rows} rows, but there are {len(texts)} texts"
            )
        self._numbers = []
        for read in self._read:
            rows, numbers, kept = read()
            whole = self._n_rows is not None or len(numbers) == len(texts)
            if whole and not len(numbers):
                continue
            if rows.ndim != 2 or rows.shape[1] != width or not whole:
                unit = "bytes of bits" if self.dtype in BITS else "dimensions"
                raise CorpusError(
                    f"{self.path} has shape {rows.shape}, but there are {len(texts)} texts and "
                    f"the model has {width} {unit}"
                )
            texts_then: Sequence[str | None] = kept or [None] * len(numbers)
            for number, text in zip(numbers, texts_then, strict=True):
                now = texts[number] if number < len(texts) else None
                if now is None or text not in (None, now):
                    raise CorpusError(f"row {number} of {self.path} has another text: {_AGAIN}")
            if changed:
                raise CorpusError(f"{self.path} was made from other texts: {_AGAIN}")
            self._numbers.append(numbers)
            yield rows


_AGAIN = "embed the corpus again"


def _record_path(path: Path) -> Path:
    """Return the path of the file that records how a file was made."""
    return path.with_name(f"{path.name}.json")


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def _read_npy(path: Path, dtype: str) -> Part:
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise CorpusError(f"{path} does not hold a matrix: {error}") from None
    return rows, np.arange(rows.shape[0] if rows.ndim else 0), None


def _read_jsonl(path: Path, dtype: str) -> Part:
    rows, numbers, texts = [], [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
                rows.append(np.array(row[shards.VECTOR], dtype=_JSON_DTYPES.get(dtype, np.float32)))
                if rows[-1].shape != rows[0].shape or rows[-1].ndim != 1:
                    raise ValueError(f"an embedding of shape {rows[-1].shape}")
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise CorpusError(f"{path}, line {number + 1}: no embedding: {error!r}") from None
            numbers.append(row.get(shards.ROW, number))
            texts.append(row.get(shards.TEXT))
    matrix = np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32)
    whole = None if None in texts else texts
    return matrix, np.array(numbers, dtype=np.int64), whole


def _read_shard(folder: Path, shard: Shard, job: dict[str, Any]) -> Part:
    path, kind = folder / shard.name, job["format"]
    has_texts = job["keep_text"]  # else a column of that name is a kept column
    if kind == "jsonl":
        rows, numbers, texts = _read_jsonl(path, job["options"]["dtype"])
        return rows, numbers, texts if has_texts else None
    if kind == "npy":  # only embeddings: their rows are those that were not rejected
        rows, _, _ = _read_npy(path, "")
        numbers = np.arange(shard.first, shard.first + shard.n_read)
        if len(rows) < shard.n_read:
            listed = folder / shards.rejects_of(shard.name)
            lines = listed.read_text(encoding="utf-8").splitlines()
            numbers = np.setdiff1d(numbers, [json.loads(line)["row"] for line in lines])
        return rows, numbers, None
    if kind == "parquet":
        table = require("pyarrow.parquet", extra="corpus").read_table(path, memory_map=True)
    else:
        pa = require("pyarrow", extra="corpus")
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    column = table.column(shards.VECTOR).combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    texts = table.column(shards.TEXT).to_pylist() if has_texts else None
    return flat.reshape(-1, column.type.list_size), table.column(shards.ROW).to_numpy(), texts
