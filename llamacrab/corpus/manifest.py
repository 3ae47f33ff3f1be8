"""What a job is, and which of its shards are finished: ``manifest.json`` in their folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llamacrab._support.files import in_parallel, sha256_of, write_whole
from llamacrab.corpus import identity
from llamacrab.errors import CorpusError

NAME = "manifest.json"
VERSION = 2


@dataclass(frozen=True)
class Shard:
    """A finished file."""

    name: str
    first: int  # row of the source with which it begins
    n_read: int  # rows of the source that it covers
    n_rows: int  # rows in it; fewer where rows were rejected
    sha256: str
    rows: str  # hash of the rows of the source that it covers


@dataclass
class Manifest:
    """A job on its folder.

    Attributes
    ----------
    job : dict
        What makes this job's vectors what they are: source, model, options. Another job has no
        business in the same folder. Empty before the first shard is written.
    made_with : dict
        Versions, for people who read it; they may change on the way.
    shards : list of Shard
        In order.
    complete : bool
        Whether the source has been read to its end.
    exports : dict of str to bool
        Files that this job makes of its shards, and whether they are whole.
    writing : str or None
        The shard that is being written: a file of this name is this job's, finished or not.
    recast : dict of str to str
        Shards that are being replaced by equal ones with wider types of columns, and the checksums
        of those.
    """

    job: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    exports: dict[str, bool] = field(default_factory=dict)
    writing: str | None = None
    recast: dict[str, str] = field(default_factory=dict)

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
                f"{path} is damaged: {error}; overwrite the job to begin again"
            ) from None
        if held.pop("version", None) != VERSION:
            raise CorpusError(
                f"{path} was written by another version of llamacrab: take another folder, or "
                "remove these files"
            )
        held["shards"] = [Shard(**shard) for shard in held["shards"]]
        return Manifest(**held)

    def refuse_other(self, job: dict[str, Any], folder: Path, *, append: bool) -> None:
        """Raise if the folder holds another job, and say what differs.

        With `append` the source may be another one: its rows are compared when they are read.
        """
        different = {
            name: f"{name}: {self.job.get(name)!r} there, {job.get(name)!r} now"
            for name in sorted({*job, *self.job})
            if self.job.get(name) != job.get(name)
        }
        advice = "Take another folder, or overwrite it"
        if "source" in different:
            sources = self.job.get("source"), job["source"]
            different["source"] = f"source: {identity.difference(*sources)}"
            if append:
                del different["source"]
            elif identity.may_have_grown(*sources):
                advice += ". If rows were only added at the end, append=True (--append) embeds them"
        if different:
            raise CorpusError(
                f"{folder} holds another job, which this one would not continue but mix up with: "
                + "; ".join(different.values())
                + f". {advice}"
            )

    def refuse_foreign(self, target: Path) -> None:
        """Raise if what lies at `target` is not this job's to replace."""
        if target.exists() and str(target.absolute()) not in self.exports:
            raise CorpusError(f"{target} is there already: remove it, or take another name")

    def count(self, shard: Shard) -> None:
        """Count a shard in."""
        if shard.first != self.n_read:
            raise CorpusError(
                f"{shard.name} begins with row {shard.first}, but {self.n_read} rows are finished"
            )
        self.shards.append(shard)
        self.writing = None

    def n_sound(self, folder: Path) -> int:
        """Return how many shards, from the first on, are there as they were written."""
        paths = [folder / shard.name for shard in self.shards]
        checksums = in_parallel(lambda path: sha256_of(path) if path.is_file() else None, paths)
        for k, (shard, found) in enumerate(zip(list(self.shards), checksums, strict=True)):
            if found is not None and found == self.recast.get(shard.name):
                self.shards[k] = replace(shard, sha256=found)
            elif found != shard.sha256:
                return k
        return len(self.shards)

    def keep(self, n_shards: int) -> list[str]:
        """Forget all but the first `n_shards` shards, and return the names of the others."""
        dropped = [shard.name for shard in self.shards[n_shards:]]
        if dropped:
            del self.shards[n_shards:]
            self.reopen()
        return dropped

    def reopen(self) -> None:
        """Note that there is more to be done, for the exports too."""
        self.complete = False
        self.exports = dict.fromkeys(self.exports, False)
