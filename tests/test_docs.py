"""What the documentation shows must run, and what it lists must be all there is.

Each page runs in a process of its own, in a folder that looks like the root of a clone. Run as a
script, this file is that process.
"""

from __future__ import annotations

import builtins
import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import one_cpu

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its sections need packages that need not be there, and go on each from the page's first block.
INDEXES = ROOT / "docs" / "indexes.md"
# Blocks marked `py` show other libraries. They run where these are installed, together with ours.
MIGRATIONS = {
    ROOT / "docs" / "from-llama-cpp-python.md": "llama_cpp",
    ROOT / "docs" / "from-sentence-transformers.md": "sentence_transformers",
}
# Pages of the site: the names in the reference are filled in when it is built.
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
SITE = ROOT / "mkdocs.yml"
# A title, which the site shows, may follow the language.
BLOCK = re.compile(r"^```(\w+)(?: [^\n]*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of languages, each moved down to the line where it stands."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, found.start(2)) + found[2]
        for found in BLOCK.finditer(text)
        if found[1] in languages
    ]


def commands(page: Path) -> list[str]:
    """Return the commands of llamacrab on a page; pip and the like are not run."""
    lines = [line for block in blocks(page, "bash") for line in block.strip().splitlines()]
    plain = [line.removeprefix(".venv/bin/") for line in lines]
    return [line for line in plain if line.startswith("llamacrab ")]


def run_python(page: Path, *languages: str) -> None:
    """Run the Python blocks of a page in order, in one namespace."""
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python", *languages):
        if ">>> " in block:
            check_examples(block, namespace, page)
        else:
            exec(compile(block, page, "exec"), namespace)


def sections(page: Path) -> dict[str, str]:
    """Return the sections of a page that hold Python, each after the page's beginning."""
    beginning, *rest = re.split(r"^## (.+)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return {heading: beginning + body for heading, body in pairs if "```python" in body}


def check_examples(text: str, namespace: dict[str, object], where: Path | str) -> None:
    """Run the examples of a text, and raise where one does not give what it shows."""
    test = doctest.DocTestParser().get_doctest(text, {}, str(where), str(where), 0)
    test.globs = namespace
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
        test, out=said.append, clear_globs=False
    )
    if failed.failed:
        raise AssertionError("".join(said))


def documented_objects() -> dict[str, str]:
    """Return the docstrings of llamacrab that hold examples, by the name of their object."""
    import llamacrab

    found = {}
    for module_name in [
        "",
        *(f".{part.name}" for part in pkgutil.iter_modules(llamacrab.__path__)),
    ]:
        if module_name in (".__main__", ".cli"):
            continue
        module = importlib.import_module(f"llamacrab{module_name}")
        found[module.__name__] = module.__doc__
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            found[f"{module.__name__}.{name}"] = inspect.getdoc(value)
            for part, member in vars(value).items() if inspect.isclass(value) else ():
                found[f"{module.__name__}.{name}.{part}"] = getattr(member, "__doc__", None)
    return {name: doc for name, doc in found.items() if doc and ">>> " in doc}


@pytest.fixture
def clone(tmp_path):
    """Return a folder with what the pages read, where they may write."""
    for folder in ("docs", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    return tmp_path


def run(command: list[str], folder: Path) -> None:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    with one_cpu():
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page != INDEXES],
    ids=lambda page: page.stem,
)
def test_python_of_a_page_runs_and_says_what_the_page_shows(page, clone):
    run([sys.executable, "-W", "error", __file__, str(page)], clone)


@pytest.mark.parametrize("page", MIGRATIONS, ids=lambda page: page.stem)
def test_a_page_about_another_library_runs_with_that_library(page, clone):
    if importlib.util.find_spec(MIGRATIONS[page]) is None:
        pytest.skip(f"{MIGRATIONS[page]} is not installed")
    run([sys.executable, __file__, str(page), "py"], clone)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "py")], ids=lambda page: page.stem
)
def test_code_that_is_only_shown_is_python(page):
    for block in blocks(page, "py"):
        compile(block, page, "exec")


@pytest.mark.parametrize("heading", sections(INDEXES))
def test_an_index_finds_what_the_exact_search_finds(heading, clone):
    text = sections(INDEXES)[heading]
    package = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)[-1]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    page = clone / "indexes.md"
    page.write_text(text, encoding="utf-8")
    # Warnings of these packages at their import are no concern of ours.
    run([sys.executable, __file__, str(page)], clone)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem
)
def test_commands_of_a_page_run(page, clone):
    pytest.importorskip("click")
    run(["bash", "-euxo", "pipefail", "-c", "\n".join(commands(page))], clone)


def test_examples_in_docstrings_say_what_they_show():
    examples = documented_objects()
    assert {"llamacrab", "llamacrab.llama.Llama", "llamacrab._core.Batch"} <= set(examples)
    import llamacrab

    for name, doc in examples.items():
        check_examples(doc, dict(vars(llamacrab)), name)


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, *API_PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_index_and_in_the_readme():
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert f"]({page.name})" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
            assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_of_the_site_once():
    navigation = SITE.read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", navigation, re.MULTILINE)
    pages = (ROOT / "docs").rglob("*.md")
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in pages)


def test_every_public_name_is_in_the_reference():
    import llamacrab

    shown = {
        name
        for page in API_PAGES
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    names = {f"llamacrab.{name}" for name in llamacrab.__all__ if not name.startswith("__")}
    # This one is with its kin.
    names.discard("llamacrab.LlamaError")
    modules = {"llamacrab.errors", "llamacrab.similarity", "llamacrab.quantize", "llamacrab.tuning"}
    assert names | modules <= shown
    for name in shown:
        module_name, _, attribute = name.rpartition(".")
        if importlib.util.find_spec(module_name) and hasattr(
            importlib.import_module(module_name), attribute
        ):
            continue
        importlib.import_module(name)


def test_the_reference_has_the_docstrings_of_the_extension(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(ROOT / "docs" / "tools")
    from pyx_docstrings import docstrings

    from llamacrab import _core

    found = docstrings(ROOT / "llamacrab" / "core")
    for name in ("Model", "Vocab", "Context", "Batch", "PoolingType"):
        kind = getattr(_core, name)
        for member in ("", *(part for part in vars(kind) if not part.startswith("_"))):
            value = vars(kind)[member] if member else kind
            # Members of an enum have the docstring of the enum.
            if getattr(value, "__doc__", None) and not isinstance(value, int):
                built = inspect.cleandoc(value.__doc__)
                assert built.endswith(found[f"{name}.{member}" if member else name]), member


def test_the_table_of_errors_is_the_tree():
    from llamacrab import errors

    def tree(kind: type[Exception], depth: int = 0) -> list[tuple[str, int]]:
        under = [
            error for error in vars(errors).values() if kind in getattr(error, "__bases__", ())
        ]
        return [(kind.__name__, depth), *(row for error in under for row in tree(error, depth + 1))]

    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:- )*)`(\w+)` \| *(?:`(\w+)`)? *\|", text, re.MULTILINE)
    assert [(name, len(dashes) // 2) for dashes, name, _ in rows] == tree(errors.LlamaError)
    for _, name, builtin in rows:
        assert not builtin or issubclass(getattr(errors, name), getattr(builtins, builtin))


def test_every_build_option_is_on_the_page_about_building():
    options = re.findall(
        r"^option\('([\w-]+)'", (ROOT / "meson.options").read_text(encoding="utf-8"), re.MULTILINE
    )
    text = (ROOT / "docs" / "building.md").read_text(encoding="utf-8")
    assert options == [name for name in options if f"| `{name}` |" in text]


def test_every_command_and_option_is_on_the_page_about_the_command_line():
    pytest.importorskip("click")
    from llamacrab.cli import main

    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in main.commands.items():
        assert f"llamacrab {name}" in text
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option in text, f"{name} {option}"


if __name__ == "__main__":
    run_python(Path(sys.argv[1]), *sys.argv[2:])
