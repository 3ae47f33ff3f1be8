"""llama-cpp-python: `Llama.embed`, with `batch` texts a call; `outtype` chooses the weights, other
settings are its keywords."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np


class Peer:
    def load(
        self, files: dict[str, str], *, batch: int = 1, outtype: str = "bf16", **how: Any
    ) -> str:
        self._batch = batch
        path = files[f"gguf {outtype}"]
        self._llama = llama_cpp.Llama(path, embedding=True, verbose=False, **how)
        return f"llama-cpp-python {llama_cpp.__version__}"

    def embed(self, texts: list[str]) -> np.ndarray:
        rows = []
        for i in range(0, len(texts), self._batch):
            rows += self._llama.embed(texts[i : i + self._batch], normalize=True, truncate=True)
        return np.array(rows, dtype=np.float32)
