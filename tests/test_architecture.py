"""Which part may use which: the table of CONTRIBUTING, enforced. A room is a folder or a module."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llamacrab"

# What each room may import. What imports another room must not be imported by it in turn.
MAY_IMPORT = {
    "errors": set(),
    "_core": {"errors"},
    "similarity": {"errors"},
    "quantize": {"errors"},
    "options": {"errors"},
    "_support": {"errors", "_core"},
    "tuning": {"errors", "_core", "_support"},
    "requests": {"errors", "_core", "options", "quantize"},
    "models": {"errors", "_core", "_support", "requests"},
    "_diagnostics": {"_core", "_support"},
    "_engine": {"errors", "_core", "_support", "tuning"},
    "llama": {
        "errors", "_core", "options", "requests", "models", "tuning", "_engine", "_diagnostics",
    },
    "corpus": {
        "errors", "_core", "_support", "options", "similarity", "requests", "llama",
    },
    "integrations": {"errors", "_support", "options", "llama"},
    "bench": {"errors", "_core", "_support", "options", "_engine", "llama"},
    "cli": {
        "errors", "_core", "_support", "options", "similarity", "requests", "models", "tuning",
        "llama", "corpus", "bench",
    },
}  # fmt: skip
# These tie the rooms together.
ENTRANCES = {"__init__", "__main__"}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "_core" if first == "core" else first.removesuffix(".py").removesuffix(".pyi")


def imported(node: ast.AST) -> set[str]:
    """Return the names below ``llamacrab`` that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "llamacrab":
        names = [f"llamacrab.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    else:
        return set()
    return {name.split(".")[1] for name in names if name.startswith("llamacrab.")}


def found_edges() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")) + sorted(PACKAGE.glob("*.pyi")):
        room = room_of(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            edges.setdefault(room, set()).update(imported(node) - {room})
    for path in (PACKAGE / "core").glob("*.pyx"):
        text = path.read_text(encoding="utf-8")
        edges["_core"] |= set(re.findall(r"^\s*from llamacrab\.(\w+)", text, re.MULTILINE))
    return edges


EDGES = found_edges()


@pytest.mark.parametrize("room", sorted(EDGES.keys() - ENTRANCES))
def test_a_room_imports_only_what_it_may(room):
    # `from llamacrab import Llama` is what users write; inside, the module is named.
    beyond = EDGES[room] - MAY_IMPORT[room]
    assert not beyond, f"llamacrab/{room} must not import {', '.join(sorted(beyond))}"


def test_no_rule_is_left_for_what_nobody_imports_and_no_room_goes_in_circles():
    assert set(MAY_IMPORT) == EDGES.keys() - ENTRANCES
    unused = {room: sorted(may - EDGES[room]) for room, may in MAY_IMPORT.items()}
    assert not any(unused.values()), unused
    list(TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError


def includes(path: Path) -> set[str]:
    return set(re.findall(r'#include [<"]([^">]+)[">]', path.read_text(encoding="utf-8")))


def test_kernels_know_nothing_of_the_scheduler_and_the_arithmetic_nothing_of_ggml():
    for path in (PACKAGE / "kernels").rglob("*.[ch]pp"):
        used = includes(path)
        # The pool of threads knows nothing of llama.cpp either.
        assert not any("native/" in name and "thread_pool" not in name for name in used), path
        in_simd = "simd" in path.parts
        assert not (in_simd and any(name.startswith(("ggml", "llama")) for name in used)), path
        assert in_simd or not any(name.endswith("intrin.h") or "neon" in name for name in used), (
            path
        )


def test_tokens_are_decoded_in_one_file():
    users = {
        path.stem
        for pattern in ("*.[ch]pp", "*.p[yx][xd]")
        for path in PACKAGE.rglob(pattern)
        if re.search(r"\bllama_(decode|encode|get_embeddings\w*)\(", path.read_text("utf-8"))
    }
    assert users == {"decoder"}


def test_a_foreign_function_is_declared_in_one_file():
    for path in (PACKAGE / "core").glob("*.p[yx][xd]"):
        text = path.read_text(encoding="utf-8")
        if path.name != "libllama.pxd":
            assert not re.search(r'cdef extern from "(llama|ggml|gguf)', text), path
