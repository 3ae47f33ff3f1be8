"""What a job is, and which of its shards are finished: ``manifest.json`` beside them."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamacrab._support.fetch import sha256_of
from llamacrab.errors import CorpusError

NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """A finished file."""

    name: str
    first: int  # row of the source with which it begins
    n_read: int  # rows of the source that it covers
    n_rows: int  # rows in it; fewer where rows were rejected
    sha256: str


@dataclass
class Manifest:
    """A job on its folder.

    Attributes
    ----------
    job : dict
        What makes this job's vectors what they are: source, model, options. Another job has no
        business in the same folder.
    made_with : dict
        Versions, for whoever reads it; they may change on the way.
    shards : list of Shard
        In order.
    complete : bool
        Whether the source has been read to its end.
    exports : dict of str to bool
        Files that this job makes of its shards, and whether they are whole.
    """

    job: dict[str, Any]
    made_with: dict[str, str] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    exports: dict[str, bool] = field(default_factory=dict)

    @property
    def n_read(self) -> int:
        """Rows of the source that finished shards cover."""
        return sum(shard.n_read for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_whole(folder / NAME, text.encode())

    @staticmethod
    def load(folder: Path) -> Manifest | None:
        """Read the manifest of a folder; None where there is none."""
        path = folder / NAME
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorpusError(
                f"{path} is damaged: {error}; overwrite the job to begin anew"
            ) from None
        if held.pop("version", None) != VERSION:
            raise CorpusError(f"{path} was written by another version of llamacrab")
        held["shards"] = [Shard(**shard) for shard in held["shards"]]
        return Manifest(**held)

    def refuse_other(self, job: dict[str, Any], folder: Path) -> None:
        """Raise if the folder holds another job, and say what differs."""
        job = json.loads(json.dumps(job))  # as it is read back
        different = [
            f"{name}: {self.job.get(name)!r} there, {job.get(name)!r} now"
            for name in sorted({*job, *self.job})
            if self.job.get(name) != job.get(name)
        ]
        if different:
            raise CorpusError(
                f"{folder} holds another job, which this one would not continue but mix up with: "
                + "; ".join(different)
                + ". Take another folder, or overwrite it"
            )

    def refuse_foreign(self, target: Path) -> None:
        """Raise if what lies at `target` is not this job's to replace."""
        if target.exists() and str(target.absolute()) not in self.exports:
            raise CorpusError(f"{target} is there already: remove it, or take another name")

    def drop_damaged(self, folder: Path) -> list[str]:
        """Forget shards whose files are missing or changed, and all after the first of them."""
        for k, shard in enumerate(self.shards):
            path = folder / shard.name
            if not path.is_file() or sha256_of(path) != shard.sha256:
                dropped = self.shards[k:]
                self.shards = self.shards[:k]
                self.complete = False
                self.exports = dict.fromkeys(self.exports, False)
                return [shard.name for shard in dropped]
        return []


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one, and on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have a rename inside a folder reach the disk, where the system can be told to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
