"""Import an optional package when it is needed, or say what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from llamacrab.errors import MissingExtraError


def require(package: str, *, extra: str) -> ModuleType:
    """Return the module `package`.

    Raises
    ------
    MissingExtraError
        The package is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name not in (package, package.partition(".")[0]):
            raise
        raise MissingExtraError(package, extra) from None
