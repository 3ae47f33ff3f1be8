"""What the oracle scripts share: the corpus, ragged arrays, and where results go."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "data"


def read_texts() -> list[str]:
    """Return the corpus; a text's place in the list is its id."""
    with (DATA / "texts.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    if [record["id"] for record in records] != list(range(len(records))):
        raise ValueError("texts.jsonl: ids must be 0, 1, 2, ...")
    return [record["text"] for record in records]


def ragged(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Store lists of token ids as one flat array, as npz has no ragged arrays."""
    return {
        "ids": np.concatenate([np.asarray(row, np.int32) for row in rows]),
        "offsets": offsets(len(row) for row in rows),
    }


def offsets(lengths: Iterable[int]) -> np.ndarray:
    """Return where each row starts in a flat array, and last where the array ends."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to length one, as llamacrab does by default."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
