"""Obtain the source tree of llama.cpp that `pin.json` names."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = json.loads((HERE / "pin.json").read_text(encoding="utf-8"))
# The part of the tree that a build of the library reads: 32 of 176 MB.
NEEDED = ("CMakeLists.txt", "LICENSE", "cmake/", "ggml/", "include/", "src/", "vendor/")


def _load_helper():
    """Import llamacrab/_support/fetch.py by its path: the package itself is not built yet."""
    spec = importlib.util.spec_from_file_location(
        "fetch", HERE.parents[1] / "llamacrab" / "_support" / "fetch.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


helper = _load_helper()


def source_tree(destination: Path, downloads: Path) -> Path:
    """Return `destination`, holding the needed part of the pinned tree.

    The tree appears under its name only when it is whole: it is unpacked beside and renamed.
    """
    stamp = destination / ".sha256"
    if stamp.is_file() and stamp.read_text() == PIN["sha256"]:
        return destination
    archive = helper.fetch(PIN["name"], PIN["version"], PIN["sha256"], "sdist", downloads)
    partial = destination.with_name(f"{destination.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            # Debian 12's Python 3.11.2 lacks the filter; there the pinned hash alone must do.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(partial, members=_members(tar))
        (partial / ".sha256").write_text(PIN["sha256"])
        shutil.rmtree(destination, ignore_errors=True)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def _members(tar: tarfile.TarFile):
    prefix = f"{PIN['name'].replace('-', '_')}-{PIN['version']}/{PIN['subdirectory']}/"
    for member in tar:
        name = member.name.removeprefix(prefix)
        if name != member.name and name.startswith(NEEDED):
            member.name = name
            yield member


if __name__ == "__main__":
    try:
        print(source_tree(Path(sys.argv[1]), helper.cache_dir() / "downloads"))
    except helper.FetchError as error:
        sys.exit(f"llama.cpp: {error}")
