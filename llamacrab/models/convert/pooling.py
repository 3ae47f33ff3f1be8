"""Find the pooling of a folder's model: from the caller, its files, or the model's family."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from llamacrab._core import PoolingType
from llamacrab.errors import ConvertError
from llamacrab.models.convert.folder import parse, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POOLINGS = ("mean", "cls", "last")

# Pattern of a name, and how that family of BERT embedders pools. The first match counts.
# From the code on their model cards: `[:, 0]` (CLS) or `average_pool` / `mean_pooling`. fastembed
# has the same in its lists of models (its pull request 486 corrected gte-large). Models that are
# not here, such as bge-micro and mxbai-embed-xsmall, may pool differently from their relatives.
FAMILIES = (
    ("bge-(small|base|large)-(en|zh)", "CLS"),
    ("snowflake-arctic-embed", "CLS"),
    ("mxbai-embed-(2d-)?large", "CLS"),
    ("gte-(small|base|large)-zh", "CLS"),
    ("gte-(small|base|large)$", "MEAN"),
    ("e5-(small|base|large)", "MEAN"),
    ("(all|paraphrase|paraphrase-multilingual)-minilm", "MEAN"),
)


def choose(folder: Path, config: dict[str, Any], wanted: PoolingType | str | None) -> str | None:
    """Return the name of the pooling to write into the GGUF, or None to leave it open.

    Warn if `wanted` contradicts the folder, or if the pooling is not known.
    """
    configured = _configured(folder)
    if wanted is not None:
        pooling = wanted.name if isinstance(wanted, PoolingType) else str(wanted).upper()
        if pooling.lower() not in POOLINGS:
            raise ConvertError(f"pooling must be one of {', '.join(POOLINGS)}, not {wanted!r}")
        if configured not in (None, pooling):
            _warn(f"pooling {pooling} contradicts {folder}, which says {configured}")
        return pooling
    if known := configured or _known(folder, config):
        return known
    _warn(
        f"{folder} does not say how its vectors are pooled, and it is of no family that is known: "
        "the GGUF leaves it open, and llamacrab will take the mean over all tokens. Look at the "
        "model's card, and convert again with pooling='cls' (--pooling cls) if it takes the first "
        "token; pooling='mean' says that the mean is right"
    )
    return None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # where `convert` was called


def _configured(folder: Path) -> str | None:
    """Return the pooling of sentence-transformers: "MEAN", "CLS", "LAST" or None."""
    if not (folder / "modules.json").is_file():
        # A download without all files.
        place = folder / "1_Pooling"
        return _mode(place) if (place / "config.json").is_file() else None
    try:
        modules = {m["type"].rpartition(".")[2]: m["path"] for m in parse(folder / "modules.json")}
    except (KeyError, TypeError, AttributeError):
        raise ConvertError(f"{folder / 'modules.json'} does not hold a list of modules") from None
    if others := set(modules) - {"Transformer", "Pooling", "Normalize"}:
        raise ConvertError(f"{folder} has a module that a GGUF cannot hold: {min(others)}")
    return _mode(folder / modules["Pooling"]) if "Pooling" in modules else None


def _mode(place: Path) -> str:
    settings = read_json(place / "config.json")
    known = {"mean_tokens": "MEAN", "cls_token": "CLS", "lasttoken": "LAST"}
    chosen = [
        key.removeprefix("pooling_mode_")
        for key, value in settings.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if not chosen and isinstance(settings.get("pooling_mode"), str):
        modes = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
        chosen = [modes.get(settings["pooling_mode"], settings["pooling_mode"])]
    if len(chosen) != 1 or chosen[0] not in known:
        raise ConvertError(
            f"{place}: mean, cls and last-token pooling are supported, not {' + '.join(chosen)!r}"
        )
    return known[chosen[0]]


def _known(folder: Path, config: dict[str, Any]) -> str | None:
    for candidate in _names(folder, config):
        name = re.sub(r"[\s_]+", "-", candidate.strip().lower())
        for pattern, pooling in FAMILIES:
            if re.search(rf"(?<![a-z0-9]){pattern}", name):
                return pooling
    return None


def _names(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """Yield possible names of the model, the most reliable first."""
    place = folder.resolve()
    yield place.name
    if place.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/COMMIT, a download's cache
        yield place.parent.parent.name
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        # The name in its list of results, and its title.
        for pattern in (r"^model-index:\s*-\s*name:\s*(\S+)", r"^# (.+)"):
            if found := re.search(pattern, text, re.MULTILINE):
                yield found[1]
    # The model that it was trained from, or its own name.
    yield str(config.get("_name_or_path") or "")
