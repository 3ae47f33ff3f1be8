"""llamacrab: what `Llama()` gives. Settings are its keywords; `outtype` chooses the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

import llamacrab


class Peer:
    def load(self, files: dict[str, str], *, outtype: str = "bf16", **how: Any) -> str:
        self._llama = llamacrab.Llama(files[f"gguf {outtype}"], **how)
        return f"llamacrab {llamacrab.__version__}"

    def embed(self, texts: list[str]) -> np.ndarray:
        return self._llama.embed_texts(texts, truncate=True, dedup=False)
