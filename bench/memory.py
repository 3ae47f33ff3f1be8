"""Peak memory of a stream of many texts over that of few, each in a process of its own.

python bench/memory.py [--few 10000] [--many 1000000] [--model GGUF]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "tests" / "data" / "tiny-bert.gguf"

CODE = """
import resource, sys, time
from llamacrab import Llama
n = int(sys.argv[1])
lines = (f"text number {i} of a long stream that is never held as a whole" for i in range(n))
start = time.perf_counter()
with Llama(sys.argv[2], n_threads=1) as llama:
    seen = sum(len(rows) for rows in llama.embed_iter(lines))
assert seen == n
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak, time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=10_000)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--model", default=str(TINY))
    args = parser.parse_args()
    peaks = []
    for n in (args.few, args.many):
        command = [sys.executable, "-c", CODE, str(n), args.model]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        peaks.append(int(out[0]))
        print(
            f"{n:9,} texts: peak RSS {peaks[-1] / 1024:.1f} MiB, {n / float(out[1]):,.0f} texts/s"
        )
    print(f"many over few: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
