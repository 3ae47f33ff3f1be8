"""Everything that callers can do to one `Llama` at once, for a while; every row is checked.

    python tests/stress/stress.py [--seconds 10] [--seed 0] [--threads 2]

`sanitize.py` runs it under ThreadSanitizer and AddressSanitizer, `tests/test_stress.py` as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import faulthandler
import random
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import DATA, TEXTS

from llamacrab import Llama, LlamaError, errors

LONG = [text for text in TEXTS if len(text) > 400]
# What a fault, a time limit or a full queue may make of a call; anything else is a bug.
EXPECTED = (
    errors.DecodeError,
    errors.AllocationError,
    errors.NumericalError,
    errors.LlamaTimeoutError,
    errors.QueueFull,
)


class Stress:
    """One shared model, one more that comes and goes, and what must hold of their rows."""

    def __init__(self, n_threads: int) -> None:
        self.sizes = {"n_contexts": 3, "n_threads": n_threads, "pack_tokens": 128}
        self.counts: Counter[str] = Counter()
        self.on_pack: Counter[str] = Counter()
        self.llama = Llama(
            DATA / "tiny-bert.gguf", queue_tokens=4096, on_pack=self.count_pack, **self.sizes
        )
        self.rows = self.llama.embed_texts(TEXTS, truncate=True)

    def count_pack(self, record: dict[str, float]) -> None:
        self.on_pack["texts"] += int(record["n_texts"])

    def check(self, chosen: list[int], rows: np.ndarray, done: np.ndarray | None = None) -> None:
        """Compare rows, or those of them that are done, with what the texts gave alone."""
        cosines = (rows * self.rows[chosen]).sum(axis=1)
        assert (cosines if done is None else cosines[done]).min(initial=1) > 0.9999

    # Each of these is done over and over by a thread of its own.

    def single(self, rng: random.Random) -> None:
        i = rng.randrange(len(TEXTS))
        self.check([i], self.llama.embed(TEXTS[i], truncate=True)[None])

    def bulk(self, rng: random.Random) -> None:
        chosen = [rng.randrange(len(TEXTS)) for _ in range(rng.choice([2, 40, 300]))]
        timeout = rng.choice([None, None, 0.01])
        dedup = rng.random() < 0.5
        texts = [TEXTS[i] for i in chosen]
        try:
            rows = self.llama.embed_texts(texts, truncate=True, dedup=dedup, timeout=timeout)
        except LlamaError as error:
            self.check(chosen, error.rows, error.done)
            raise
        self.check(chosen, rows)

    def futures(self, rng: random.Random) -> None:
        chosen = [rng.randrange(len(TEXTS)) for _ in range(60)]
        futures = [
            self.llama.submit([TEXTS[i], TEXTS[i]], truncate=True, block=rng.random() < 0.9)
            for i in chosen
        ]
        for future in futures[::3]:
            future.cancel()
        for i, future in zip(chosen, futures, strict=True):
            try:
                self.check([i, i], future.result(timeout=120))
            except concurrent.futures.CancelledError:
                assert future.cancelled()

    def stream(self, rng: random.Random) -> None:
        chosen = [rng.randrange(len(TEXTS)) for _ in range(200)]
        stream = self.llama.embed_iter((TEXTS[i] for i in chosen), truncate=True, batch_size=32)
        for k, rows in enumerate(stream):
            self.check(chosen[32 * k : 32 * k + len(rows)], rows)
            if rng.random() < 0.1:
                stream.close()

    def tasks(self, rng: random.Random) -> None:
        async def run() -> None:
            chosen = [rng.randrange(len(TEXTS)) for _ in range(20)]
            bulk = asyncio.create_task(self.llama.aembed_texts(LONG * 5, truncate=True))
            rows = await asyncio.gather(
                *[self.llama.aembed(TEXTS[i], truncate=True) for i in chosen],
                return_exceptions=True,
            )
            bulk.cancel()
            await asyncio.gather(bulk, return_exceptions=True)
            for i, row in zip(chosen, rows, strict=True):
                if isinstance(row, BaseException):
                    raise row
                self.check([i], row[None])

        asyncio.run(run())

    def faults(self, rng: random.Random) -> None:
        kind = rng.choice(["decode_error", "no_memory", "throws", "not_finite"])
        self.llama._scheduler._inject(kind, after=rng.randrange(20), times=rng.randrange(1, 4))
        time.sleep(0.02)
        self.llama._scheduler._inject("none")

    def look(self, rng: random.Random) -> None:
        self.llama.stats()
        self.llama.recent_packs()
        self.llama._scheduler.pack_tokens = rng.choice([64, 128, 192])
        time.sleep(0.001)

    def come_and_go(self, rng: random.Random) -> None:
        llama = Llama(DATA / "tiny-bert.gguf", **self.sizes)
        future = llama.submit(TEXTS, truncate=True)
        closer = threading.Timer(rng.random() * 0.05, llama.close)
        closer.start()
        with contextlib.suppress(errors.ClosedError):
            self.check(list(range(len(TEXTS))), llama.embed_texts(TEXTS, truncate=True))
        closer.join()
        assert isinstance(future.exception(timeout=120), (errors.ClosedError, type(None)))

    def run(self, seconds: float, seed: int) -> int:
        """Do all of it for a while and return how many threads have failed."""
        works = [self.single] * 4 + [self.bulk] * 2 + [self.futures, self.stream, self.tasks]
        works += [self.faults, self.look, self.come_and_go]
        failures: list[str] = []
        ends = time.monotonic() + seconds

        def repeat(work, number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            while time.monotonic() < ends and not failures:
                try:
                    work(rng)
                    self.counts[work.__name__] += 1
                except EXPECTED as error:
                    self.counts[type(error).__name__] += 1
                except BaseException:
                    failures.append(f"{work.__name__}\n{traceback.format_exc()}")

        threads = [
            threading.Thread(target=repeat, args=(work, number))
            for number, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # A pack whose callers have all cancelled may still be on its way to its end.
        ends = time.monotonic() + 60
        while True:
            stats, n_told = self.llama.stats(), self.on_pack["texts"]
            n_texts = sum(worker["texts"] for worker in stats["workers"])
            as_expected = not stats["queued_tokens"] and n_told == n_texts
            if as_expected or time.monotonic() > ends:
                break
            time.sleep(0.01)
        self.llama.close()
        print(dict(self.counts), stats, sep="\n")
        if not as_expected:
            failures.append(f"{stats} is left, on_pack was called for {n_told} texts")
        print(*failures, sep="\n", file=sys.stderr)
        return len(failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads a context")
    args = parser.parse_args()
    # What hangs says where.
    faulthandler.dump_traceback_later(args.seconds * 10 + 120, exit=True)
    sys.exit(min(1, Stress(args.threads).run(args.seconds, args.seed)))


if __name__ == "__main__":
    main()
