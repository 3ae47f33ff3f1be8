"""The cases of a benchmark: each does a piece of work once, and returns how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llamacrab._core import PoolingType
from llamacrab._engine import CALIBRATION_TEXTS
from llamacrab.bench import workloads
from llamacrab.llama import Llama
from llamacrab.options import EmbedOptions

OPTIONS = EmbedOptions(truncate=True)
QUERY = "what do people do before the sea comes back"
THREADS = 8


@dataclass
class Sample:
    """One run of a case.

    Attributes
    ----------
    seconds : float
        The duration.
    n, n_tokens : int
        Number of texts (or pairs, or loads), and of tokens.
    latencies : list of float
        Seconds per call, if the case makes single calls.
    """

    seconds: float
    n: int
    n_tokens: int = 0
    latencies: list[float] = field(default_factory=list)


class Cases:
    """A loaded model, and the cases to run with it.

    Parameters
    ----------
    path : str or None
        The GGUF; by default all-MiniLM-L6-v2.
    seconds : float
        Approximate duration of a run of a case; the number of texts depends on it.
    **llama_kwargs
        Keywords of `Llama`.
    """

    def __init__(self, path: str | None, *, seconds: float, **llama_kwargs: Any) -> None:
        self._path = path
        self._llama_kwargs = llama_kwargs
        self.llama = Llama(path, **llama_kwargs)
        self._seconds = seconds
        self._texts: dict[str, list[str]] = {}
        if self.llama.pooling_type == PoolingType.RANK:
            self.by_name: dict[str, Callable[[], Sample]] = {
                "load": self._load,
                "tokenize": self._tokenize,
                "rerank": self._rerank,
            }
        else:
            self.by_name = {
                "load": self._load,
                "tokenize": self._tokenize,
                "one by one": self._singly,
                f"{THREADS} threads": self._threads,
                "short": lambda: self._bulk("short"),
                "mixed": lambda: self._bulk("mixed"),
                "long": lambda: self._bulk("long"),
            }
            # The first large job of a model is a calibration: do not measure it.
            self.llama.embed_texts(workloads.short(4 * CALIBRATION_TEXTS), options=OPTIONS)

    def run(self, name: str) -> Sample:
        """Run a case once."""
        return self.by_name[name]()

    def _sized(self, name: str, make: Callable[[int], list[str]], work: Callable[..., Any]) -> Any:
        """Return as many texts as `work` needs for about the wanted duration."""
        if name not in self._texts:
            n = 16
            while True:
                texts = make(n)
                start = time.perf_counter()
                work(texts)
                taken = time.perf_counter() - start
                if taken > self._seconds / 4 or n >= 1 << 17:
                    break
                n *= 2
            self._texts[name] = make(max(1, min(1 << 17, int(n * self._seconds / taken))))
        return self._texts[name]

    def _n_tokens(self) -> int:
        return sum(int(worker["tokens"]) for worker in self.llama.stats()["workers"])

    def _timed(self, n: int, work: Callable[[], list[float] | None]) -> Sample:
        before = self._n_tokens()
        start = time.perf_counter()
        latencies = work()
        seconds = time.perf_counter() - start
        return Sample(seconds, n, self._n_tokens() - before, latencies or [])

    def _load(self) -> Sample:
        start = time.perf_counter()
        with Llama(self._path, **self._llama_kwargs):
            return Sample(time.perf_counter() - start, 1)

    def _tokenize(self) -> Sample:
        vocab = self.llama.model.vocab
        texts = self._sized(
            "tokenize", workloads.mixed, lambda texts: [vocab.tokenize(text) for text in texts]
        )
        start = time.perf_counter()
        n_tokens = sum(len(vocab.tokenize(text)) for text in texts)
        return Sample(time.perf_counter() - start, len(texts), n_tokens)

    def _embed_all(self, texts: list[str]) -> None:
        self.llama.embed_texts(texts, options=OPTIONS, dedup=False)

    def _bulk(self, name: str) -> Sample:
        texts = self._sized(name, getattr(workloads, name), self._embed_all)
        return self._timed(len(texts), lambda: self._embed_all(texts))

    def _one(self, text: str) -> float:
        start = time.perf_counter()
        self.llama.embed(text, options=OPTIONS)
        return time.perf_counter() - start

    def _singly(self) -> Sample:
        def work(texts: list[str]) -> list[float]:
            return [self._one(text) for text in texts]

        texts = self._sized("one by one", workloads.short, work)
        return self._timed(len(texts), lambda: work(texts))

    def _threads(self) -> Sample:
        with ThreadPoolExecutor(THREADS) as pool:

            def work(texts: list[str]) -> list[float]:
                return list(pool.map(self._one, texts))

            texts = self._sized("threads", workloads.short, work)
            return self._timed(len(texts), lambda: work(texts))

    def _rank_all(self, texts: list[str]) -> None:
        self.llama.rerank(QUERY, texts, truncate=True)

    def _rerank(self) -> Sample:
        texts = self._sized("rerank", workloads.short, self._rank_all)
        return self._timed(len(texts), lambda: self._rank_all(texts))
