"""Fetch one pinned file with pip, from the package index that pip is configured to use.

Used twice: by the build, for the source of llama.cpp, and at run time, for the default model. It
imports only the standard library, because the build loads it by its path, before llamacrab exists.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


class FetchError(RuntimeError):
    """A pinned file could not be fetched; the message is one line that says why."""


def cache_dir() -> Path:
    """Return the cache folder: ``$LLAMACRAB_CACHE``, or a folder in the user's cache."""
    if given := os.environ.get("LLAMACRAB_CACHE"):
        return Path(given)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llamacrab"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str, version: str, sha256: str, kind: str, directory: Path) -> Path:
    """Return the path of a distribution file of ``name==version``, downloading it if necessary.

    Parameters
    ----------
    name, version : str
        The project and its exact version, as pip knows them.
    sha256 : str
        The hash of the file. A file with another hash is never left in `directory`.
    kind : {"sdist", "wheel"}
        Which distribution to take.
    directory : Path
        Where the file is kept. Only complete files appear there, so processes may race.

    Raises
    ------
    FetchError
        pip is missing, could not download the file, or brought another file than the pinned one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}{'.tar.gz' if kind == 'sdist' else '-*.whl'}"
    for kept in directory.glob(pattern):
        if sha256_of(kept) == sha256:
            return kept
        kept.unlink(missing_ok=True)

    only = "--no-binary" if kind == "sdist" else "--only-binary"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as scratch:
        # pip builds an sdist's metadata, and so runs code of it, even to download it. Where hashes
        # are required, it looks at the file's hash first, right after the download.
        pinned = Path(scratch, "requirements.txt")
        pinned.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
        files = Path(scratch, "files")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", only, name, "--dest", str(files)]
        command += ["--require-hashes", "--requirement", str(pinned)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if other := re.search(r"\bGot\s+([0-9a-f]{64})\b", run.stderr):
            raise FetchError(
                f"{name}=={version} ({kind}) has sha256 {other[1]}, expected {sha256}: not used"
            )
        fetched = list(files.glob("*"))
        if run.returncode or len(fetched) != 1:
            lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
            reason = (lines or run.stderr.splitlines() or ["pip said nothing"])[-1]
            raise FetchError(f"cannot fetch {name}=={version} ({kind}) with pip: {reason.strip()}")
        kept = directory / fetched[0].name
        fetched[0].replace(kept)
    return kept
