"""What differs between a page as it stands in the repository and on the site: mkdocs hooks.

Python blocks that show a session become `pycon`, so that prompts and output are told from code, and
the directives of doctest in them go: they say nothing to a reader. A link whose text is the name of
a file gets the page's title, as the navigation has it.
"""

from __future__ import annotations

import re
from typing import Any

SESSION = re.compile(r"^```python\n(?=>>> )(.*?)^```$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r" *# doctest: .*")
FILE_LINK = re.compile(r"\[([\w/-]+\.md)\]\(\1")


def titles(nav: list[Any]) -> dict[str, str]:
    """Return the titles of the pages in a navigation."""
    found = {}
    for entry in nav:
        [(title, value)] = entry.items()
        found.update({value: title} if isinstance(value, str) else titles(value))
    return found


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    known = titles(config.nav)
    markdown = FILE_LINK.sub(lambda at: f"[{known.get(at[1], at[1])}]({at[1]}", markdown)
    return SESSION.sub(lambda at: f"```pycon\n{DIRECTIVE.sub('', at[1])}```", markdown)
