"""For the API reference: give what `_core.pyi` declares the docstrings of the `.pyx` files.

A griffe extension. It reads sources only, so that the site is built without compiling anything.
"""

from __future__ import annotations

import re
from inspect import cleandoc
from pathlib import Path
from typing import Any

import griffe

# A class or function, at the margin or one step in, whose first statement is a docstring.
HEAD = re.compile(
    r'^(    )?(?:cdef |cpdef )?(?:class|def) (\w+)(?:\([^)]*\))?:\n +"""(.*?)"""',
    re.MULTILINE | re.DOTALL,
)


def docstrings(folder: Path) -> dict[str, str]:
    """Return the docstrings of a folder's `.pyx` files by the names of their objects."""
    found = {}
    for file in sorted(folder.glob("*.pyx")):
        text = file.read_text(encoding="utf-8")
        owners = [(at.start(), at[1]) for at in re.finditer(r"^\S*.*?\bclass (\w+)", text, re.M)]
        for at in HEAD.finditer(text):
            name = at[2]
            if at[1]:
                name = f"{[owner for start, owner in owners if start < at.start()][-1]}.{name}"
            found[name] = cleandoc(at[3])
    return found


class PyxDocstrings(griffe.Extension):
    """Adds the docstrings, spells type aliases out, and shows ``__new__`` as ``__init__``."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.name != "llamacrab":
            return
        core = pkg["_core"]
        for name, text in docstrings(core.filepath.parent / "core").items():
            try:
                owner = core[name]
            except KeyError:  # not part of the typed face
                continue
            owner.docstring = griffe.Docstring(
                text,
                parent=owner,
                parser=loader.docstring_parser,
                parser_options=loader.docstring_options,
            )
        aliases = {name: part.value for name, part in core.attributes.items()}
        for kind in core.classes.values():
            if "__new__" in kind.members and "__init__" not in kind.members:
                kind["__new__"].name = "__init__"
                kind.members["__init__"] = kind.members.pop("__new__")
            for function in kind.functions.values():
                function.returns = aliases.get(str(function.returns), function.returns)
                for parameter in function.parameters:
                    given = parameter.annotation
                    parameter.annotation = aliases.get(str(given), given)
