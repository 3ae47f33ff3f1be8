"""The command line, once its packages are known to be there."""

from __future__ import annotations

import sys

from llamacrab._support.extras import require
from llamacrab.errors import LlamaError


def main() -> None:
    """Run `llamacrab ...` and exit: 0 done, 1 could not be done, 2 wrongly asked."""
    try:
        require("click", extra="cli")
        from llamacrab.cli import run
    except LlamaError as error:
        sys.exit(f"llamacrab: {error}")
    sys.exit(run())


if __name__ == "__main__":
    main()
