"""16 threads that embed single texts, over one bulk call; and how long Python ever stands still.

python bench/threads.py [--threads 16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from alternate import compare, seconds

from llamacrab import Llama
from llamacrab.bench.workloads import short


class Heartbeat:
    """A Python thread that wants to run every millisecond, and notes when it could not."""

    def __enter__(self) -> Heartbeat:
        self.longest = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()
        return self

    def _beat(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(0.001):
            now = time.perf_counter()
            self.longest = max(self.longest, now - last)
            last = now

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    texts = short(2000)
    gaps: dict[str, float] = {"threads": 0.0, "bulk": 0.0}

    with Llama() as llama, ThreadPoolExecutor(args.threads) as pool:

        def singly() -> None:
            with Heartbeat() as heart:
                for _ in pool.map(llama.embed, texts):
                    pass
            gaps["threads"] = max(gaps["threads"], heart.longest)

        def bulk() -> None:
            with Heartbeat() as heart:
                llama.embed_texts(texts, dedup=False)
            gaps["bulk"] = max(gaps["bulk"], heart.longest)

        runs = {
            f"{args.threads} threads, text by text": lambda: seconds(singly),
            "one bulk call": lambda: seconds(bulk),
        }
        compare("threads over bulk", len(texts), runs, args.rounds)
    for name, gap in gaps.items():
        print(f"  longest gap of a heartbeat of 1 ms, {name}: {gap * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
