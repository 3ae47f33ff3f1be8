"""Embedding on the default model, and what llamacrab itself costs on a tiny one.

These run on old commits too, so they use nothing but `Llama` and bring their own texts.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamacrab import Llama

TINY = Path(__file__).resolve().parents[3] / "tests" / "data" / "tiny-bert.gguf"
TEXT = (
    "the tide comes back over flat sand while a crab waits under its stone and the old harbour "
    "light turns slowly above boats that nobody has moved since the storm broke the longest pier"
)


def texts(n: int, n_words: int, seed: int = 0) -> list[str]:
    """Return `n` distinct texts of about so many words."""
    rng = random.Random(seed)
    words = TEXT.split()
    return [
        " ".join([str(i), *rng.choices(words, k=rng.randint(n_words // 2, n_words * 3 // 2))])
        for i in range(n)
    ]


class Embed:
    """Bulk, single and threaded calls; the fixed layout keeps commits comparable."""

    params = (["tiny", "all-MiniLM-L6-v2"],)
    param_names = ("model",)
    timeout = 300
    warmup_time = 0

    def setup(self, model: str) -> None:
        path = TINY if model == "tiny" else None
        self.llama = Llama(path, n_contexts=2, n_threads=1, pack_tokens=192, flash_attn=True)
        scale = 8 if model == "tiny" else 1
        self.short = texts(256 * scale, 14)
        self.mixed = texts(64 * scale, 14) + texts(8 * scale, 200, seed=1)
        self.single = self.short[:64]
        self.time_short(model)

    def teardown(self, model: str) -> None:
        self.llama.close()

    def time_short(self, model: str) -> None:
        self.llama.embed_texts(self.short, truncate=True)

    def time_mixed(self, model: str) -> None:
        self.llama.embed_texts(self.mixed, truncate=True)

    def time_one_by_one(self, model: str) -> None:
        for text in self.single:
            self.llama.embed(text)

    def time_eight_threads(self, model: str) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.llama.embed, self.single))

    def time_tokenize(self, model: str) -> None:
        for text in self.mixed:
            self.llama.model.vocab.tokenize(text)

    def peakmem_short(self, model: str) -> None:
        self.llama.embed_texts(self.short, truncate=True)


class Load:
    """Opening and closing a model."""

    def time_load(self) -> None:
        with Llama(TINY, n_contexts=2, n_threads=1):
            pass
