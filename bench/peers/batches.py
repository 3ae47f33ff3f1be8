"""Batches of texts of like length, for engines that bring no tokenizer: sorted, then padded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


class Batches:
    """Makes batches of at most `n_tokens` tokens with padding, and of at most `n_texts` texts.

    Attributes
    ----------
    n_embd : int
        The width of the model's vectors.
    """

    def __init__(self, folder: str, n_texts: int, n_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(512)
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        self.n_embd: int = config["hidden_size"]
        self._n_texts, self._n_tokens = n_texts, n_tokens

    def __call__(self, texts: list[str]) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yield which texts a batch has, and what goes into the graph."""
        ids = [found.ids for found in self._tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        while order:
            width = len(ids[order[0]])
            n = max(1, min(self._n_texts, self._n_tokens // width))
            which, order = order[:n], order[n:]
            tokens = np.zeros((len(which), width), dtype=np.int64)
            mask = np.zeros((len(which), width), dtype=np.int64)
            for row, i in enumerate(which):
                tokens[row, : len(ids[i])] = ids[i]
                mask[row, : len(ids[i])] = 1
            yield which, {"input_ids": tokens, "attention_mask": mask}
