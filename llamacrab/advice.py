"""What to do where a path is no model: people pass folders of weights, and names of model hubs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def on_folder(path: str) -> str:
    """Return what to do with a folder that was given as a model."""
    folder = Path(path)
    if found := sorted(one.name for one in folder.glob("*.gguf")):
        return f"it is a folder; name one of its files: {', '.join(found)}"
    if (folder / "config.json").is_file():
        command = ["llamacrab", "convert", path, "-o", f"{folder.resolve().name}.gguf"]
        return f"it is a folder; make a GGUF of it: {shlex.join(command)}"
    return "it is a folder, which holds neither a GGUF nor the config.json of a model"


def on_missing(path: str) -> str:
    """Return what to do where no file is at `path`, or nothing where that is plain."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.lower().endswith(".gguf"):
        return ""
    return (
        "; models are not fetched by name: download it, and pass its GGUF, or make one of its "
        "folder with `llamacrab convert FOLDER -o NAME.gguf`"
    )
