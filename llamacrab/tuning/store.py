"""What was measured, kept in the user's cache."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llamacrab._core import Model, build_info, devices
from llamacrab._support.fetch import cache_dir
from llamacrab._support.hardware import usable_cpus
from llamacrab._support.versions import __version__
from llamacrab.tuning.layout import Layout

# Noise up to which a measurement is relied on. See `Entry`.
QUIET = 0.25
# A measurement that is older is made again: the machine may do other things by now.
MAX_AGE_DAYS = 90


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


@dataclass(frozen=True)
class Entry:
    """A layout that was measured, and how far it can be relied on.

    Attributes
    ----------
    layout : Layout
        What was found. A long job finds `pack_tokens` only, and leaves the rest unsaid.
    measured : str
        The day, such as ``"2026-01-31"``.
    n_packs : int
        Packs that were measured.
    noise : float
        How far apart packs of one size were, or the part of the CPU that other programs took,
        whichever is greater; 0 on a machine that does nothing else.
    version : str
        The llamacrab that measured.
    """

    layout: Layout
    measured: str = field(default_factory=_today)
    n_packs: int = 0
    noise: float = 0.0
    version: str = __version__

    def is_due(self) -> bool:
        """Return whether it should be measured again: noisy, old, or of another version."""
        oldest = datetime.date.fromisoformat(_today()) - datetime.timedelta(days=MAX_AGE_DAYS)
        return (
            self.noise > QUIET or self.measured < oldest.isoformat() or self.version != __version__
        )

    def __str__(self) -> str:
        return f"{self.measured}, {self.n_packs} packs, noise {min(self.noise, 9.99):.0%}"


def content_key(path: Path, size: int = 1 << 20) -> str:
    """Name a large file by its length, its beginning and its end."""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        digest.update(file.read(size))
        file.seek(max(0, length - size))
        digest.update(file.read(size))
    return digest.hexdigest()[:32]


def key(model: Model, on_gpu: bool) -> str:
    """Name what a measurement holds for: the model's content, the device, the build, the CPUs.

    And the kernels: with those that take each text by itself larger packs are faster. A device
    that was named has a measurement of its own.
    """
    digest = hashlib.sha256(content_key(Path(model.path)).encode())
    names = sorted(device["name"] + device["description"] for device in devices())
    info = build_info()
    how = usable_cpus(), on_gpu, (model.device or "").lower(), model.cpu_backend
    for part in (*names, info["commit"], info["options"], *how):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:32]


def _file() -> Path:
    return cache_dir() / "tuning.json"


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing measured yet, or a file of another kind
        return {}
    return known if isinstance(known, dict) else {}


def recall(model: Model, on_gpu: bool) -> Entry | None:
    """Return what was measured for this model here, if anything.

    What earlier versions wrote had no date, and held what a caller had given as if it had been
    measured: it is passed over.
    """
    if not _file().is_file():
        return None
    try:
        stored = dict(_read()[key(model, on_gpu)])
        layout = Layout(**stored.pop("layout"))
        entry = Entry(layout, **{"n_packs": 0, "noise": 0.0, **stored})
        numbers = layout.n_contexts, layout.n_threads, layout.pack_tokens, entry.n_packs
        if min(numbers) < 0 or layout.flash_attn not in (True, False, "auto"):
            return None
        datetime.date.fromisoformat(entry.measured)
        entry.is_due()
    except (KeyError, TypeError, ValueError):
        return None
    return entry


def remembered(model: Model, on_gpu: bool) -> Layout | None:
    """Return the layout that was measured for this model here, if any."""
    entry = recall(model, on_gpu)
    return None if entry is None else entry.layout


def remember(
    model: Model, on_gpu: bool, layout: Layout, *, n_packs: int = 0, noise: float = 0.0
) -> None:
    """Keep a measured layout in the user's cache; a cache that cannot be written is no error."""
    _write(model, on_gpu, Entry(layout, n_packs=n_packs, noise=noise))


def remember_pack(
    model: Model, on_gpu: bool, pack_tokens: int, *, n_packs: int, noise: float
) -> Entry:
    """Keep a size of packs, unless a quieter measurement that still holds is there.

    Contexts, threads and flash attention stay what `tune` found, if it did.

    Returns
    -------
    Entry
        What holds from now on.
    """
    before = recall(model, on_gpu)
    if before is not None and not replace(before, noise=0.0).is_due() and before.noise < noise:
        return before
    layout = replace(Layout() if before is None else before.layout, pack_tokens=pack_tokens)
    entry = Entry(layout, n_packs=n_packs, noise=noise)
    _write(model, on_gpu, entry)
    return entry


def _write(model: Model, on_gpu: bool, entry: Entry) -> None:
    known = _read() | {key(model, on_gpu): asdict(entry)}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_file().parent, prefix=".tuning.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file, indent=1)
        Path(name).replace(_file())
    except OSError:
        return
