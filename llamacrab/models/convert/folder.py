"""Read the files of a model's folder, and say in one line which of them cannot be used, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llamacrab.errors import ConvertError

if TYPE_CHECKING:
    from pathlib import Path

# What to do with a folder that holds a model of another kind.
ELSEWHERE = (
    "llama.cpp's own converter may take it: python convert_hf_to_gguf.py FOLDER"
    " --outfile MODEL.gguf"
)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConvertError(f"{path.parent} lacks {path.name}") from None
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read {path}: {error}") from None


def parse(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConvertError(f"cannot read {path}: {error}") from None


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where an optional file is not there."""
    if optional and not path.is_file():
        return {}
    read = parse(path)
    if not isinstance(read, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return read


def size(config: dict[str, Any], key: str) -> int:
    """Return a size that the model's config must give."""
    said = config.get(key)
    if not isinstance(said, int) or said < 1:
        raise ConvertError(f"config.json must give {key}, a positive integer, not {said!r}")
    return said
