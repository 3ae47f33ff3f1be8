"""Look into an sdist and a wheel: what must be there, what must not, what the extension shows."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SOURCES = (".pyx", ".pxd", ".cpp", ".hpp", ".h")
# Parts of llama.cpp, which neither distribution may hold.
FOREIGN = ("llama-model.cpp", "ggml.c", "llama.h", "ggml-cpu.c", "libllama.a", "libggml.a")


def check(found: bool, complaint: str) -> None:
    if not found:
        sys.exit(f"check_dist: {complaint}")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in (
        "LICENSE",
        "README.md",
        "llamacrab/core/_core.pyx",
        "llamacrab/_support/fetch.py",
        "meson.build",
        "pyproject.toml",
        "subprojects/llama.cpp/build.py",
        "subprojects/llama.cpp/pin.json",
    ):
        check(wanted in names, f"{path.name} lacks {wanted}")
    check_no_foreign(path, names)
    check(path.stat().st_size < 10 << 20, f"{path.name} is {path.stat().st_size} bytes")


def check_wheel(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for wanted in ("LICENSE.llama.cpp", "py.typed", "_core.pyi", "__init__.py", "cli/app.py"):
            check(f"llamacrab/{wanted}" in names, f"{path.name} lacks {wanted}")
        check(any(name.endswith("licenses/LICENSE") for name in names), "the wheel lacks LICENSE")
        check_no_foreign(path, names)
        others = names - {"llamacrab/LICENSE.llama.cpp"}
        sources = sorted(name for name in others if Path(name).suffix in SOURCES)
        check(not sources, f"{path.name} holds sources: {sources}")
        missing = {file.as_posix() for file in Path("llamacrab").rglob("*.py")} - names
        check(not missing, f"{path.name} lacks {missing}: are they in their folder's meson.build?")
        libraries = [name for name in names if name.endswith(".so")]
        check(len(libraries) == 1, f"{path.name} must hold one extension, not {libraries}")
        check_extension(Path(archive.extract(libraries[0], folder)))


def check_no_foreign(path: Path, names: set[str]) -> None:
    found = sorted(name for name in names if Path(name).name in FOREIGN)
    check(not found, f"{path.name} holds parts of llama.cpp: {found}")


def check_extension(library: Path) -> None:
    """See that llama.cpp is inside, and that nobody outside can see it."""
    needs = run("ldd", str(library))
    check(
        "libllama" not in needs and "libggml" not in needs and "not found" not in needs,
        f"{library.name} needs libraries that it must not need:\n{needs}",
    )
    lines = run("nm", "-D", "--defined-only", str(library)).splitlines()
    shown = [line.split()[-1].partition("@")[0] for line in lines]
    check("PyInit__core" in shown, f"{library.name} shows {shown}")
    foreign = [name for name in shown if "llama_" in name or "ggml_" in name or "gguf_" in name]
    check(not foreign, f"{library.name} shows symbols of llama.cpp: {foreign[:5]}")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        (check_wheel if argument.suffix == ".whl" else check_sdist)(argument)
        print(f"{argument.name}: as it should be")
