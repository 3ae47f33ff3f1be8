"""Read the files of a model's folder. Errors name the file and the reason in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llamacrab.errors import ConvertError

if TYPE_CHECKING:
    from pathlib import Path

# Advice for a folder with a model of another kind.
ELSEWHERE = (
    "llama.cpp's own converter may support it: python convert_hf_to_gguf.py FOLDER"
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
    """Return the object in a JSON file; an empty one if an optional file does not exist."""
    if optional and not path.is_file():
        return {}
    value = parse(path)
    if not isinstance(value, dict):
        raise ConvertError(f"{path} does not hold a JSON object")
    return value


def size(config: dict[str, Any], key: str) -> int:
    """Return a size that the model's config must give."""
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConvertError(f"config.json must give {key}, a positive integer, not {value!r}")
    return value
