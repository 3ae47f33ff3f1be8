"""``manifest.json``: the identity of a job, and its finished shards."""

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
    first: int  # number of its first row in the source
    n_read: int  # rows of the source that it covers
    n_rows: int  # rows in it; fewer if rows were rejected
    sha256: str
    rows: str  # hash of the rows of the source that it covers


@dataclass
class Manifest:
    """The manifest of a job.

    Attributes
    ----------
    job : dict
        The identity of the job: source, model, options. Another job cannot use the same folder.
        Empty before the first shard is written.
    made_with : dict
        Versions, for information; later runs may use others.
    shards : list of Shard
        Finished shards, in order.
    complete : bool
        Whether the source has been read to its end.
    exports : dict of str to bool
        Exports of this job, and whether they are complete.
    writing : str or None
        The shard that is being written: a file of this name belongs to this job, finished or not.
    recast : dict of str to str
        Shards that are being replaced by copies with wider column types, and the checksums of
        the copies.
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
        """Write the manifest atomically."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_whole(folder / NAME, text.encode())

    @staticmethod
    def load(folder: Path) -> Manifest | None:
        """Read the manifest of a folder; None if there is none."""
        path = folder / NAME
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorpusError(
                f"{path} is damaged: {error}; overwrite the job to start again"
            ) from None
        if held.pop("version", None) != VERSION:
            raise CorpusError(
                f"{path} was written by another version of llamacrab: use another folder, or "
                "remove these files"
            )
        held["shards"] = [Shard(**shard) for shard in held["shards"]]
        return Manifest(**held)

    def refuse_other(self, job: dict[str, Any], folder: Path, *, append: bool) -> None:
        """Raise if the folder holds another job; the message says what differs.

        With `append` the source may differ: its rows are compared when they are read.
        """
        different = {
            name: f"{name}: {self.job.get(name)!r} there, {job.get(name)!r} now"
            for name in sorted({*job, *self.job})
            if self.job.get(name) != job.get(name)
        }
        advice = "Use another folder, or overwrite it"
        if "source" in different:
            sources = self.job.get("source"), job["source"]
            different["source"] = f"source: {identity.difference(*sources)}"
            if append:
                del different["source"]
            elif identity.may_have_grown(*sources):
                advice += ". If rows were only added at the end, append=True (--append) embeds them"
        if different:
            raise CorpusError(
                f"{folder} holds another job, which this one cannot continue: "
                + "; ".join(different.values())
                + f". {advice}"
            )

    def refuse_foreign(self, target: Path) -> None:
        """Raise if `target` exists and is not an export of this job."""
        if target.exists() and str(target.absolute()) not in self.exports:
            raise CorpusError(f"{target} exists already: remove it, or choose another name")

    def count(self, shard: Shard) -> None:
        """Add a finished shard."""
        if shard.first != self.n_read:
            raise CorpusError(
                f"{shard.name} begins with row {shard.first}, but {self.n_read} rows are finished"
            )
        self.shards.append(shard)
        self.writing = None

    def n_sound(self, folder: Path) -> int:
        """Return the number of shards, from the first on, that are intact."""
        paths = [folder / shard.name for shard in self.shards]
        checksums = in_parallel(lambda path: sha256_of(path) if path.is_file() else None, paths)
        for k, (shard, found) in enumerate(zip(list(self.shards), checksums, strict=True)):
            if found is not None and found == self.recast.get(shard.name):
                self.shards[k] = replace(shard, sha256=found)
            elif found != shard.sha256:
                return k
        return len(self.shards)

    def keep(self, n_shards: int) -> list[str]:
        """Keep only the first `n_shards` shards, and return the names of the others."""
        dropped = [shard.name for shard in self.shards[n_shards:]]
        if dropped:
            del self.shards[n_shards:]
            self.reopen()
        return dropped

    def reopen(self) -> None:
        """Mark the job and its exports as incomplete."""
        self.complete = False
        self.exports = dict.fromkeys(self.exports, False)
