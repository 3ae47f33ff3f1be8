"""A bulk job from Parquet to Parquet over the same texts in memory, and its peak memory.

    python bench/corpus.py [--texts 1000000] [--rounds 3]

On the tiny BERT of the tests, so that reading and writing weigh as much as they ever will. The peak
is that of a process of its own that does the bulk job alone.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from alternate import compare, seconds

from llamacrab import EmbedOptions, Llama
from llamacrab.bench.workloads import sentences
from llamacrab.corpus import embed_corpus

TINY = Path(__file__).resolve().parents[1] / "tests" / "data" / "tiny-bert.gguf"
OPTIONS = EmbedOptions(truncate=True)


def make(path: Path, n: int) -> list[str]:
    """Write `n` distinct short texts and return them."""
    source = sentences()
    texts = [f"{i} {source[i % len(source)][:40]}" for i in range(n)]
    pa.parquet.write_table(pa.table({"id": range(n), "text": texts}), path)
    return texts


def bulk(source: Path, folder: Path, llama: Llama) -> None:
    embed_corpus(source, folder, llama, keep=["id"], options=OPTIONS, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        with Llama(TINY) as llama:
            bulk(*args.alone, llama)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = make(folder / "in.parquet", args.texts)
        command = [sys.executable, __file__, "--alone", folder / "in.parquet", folder / "alone"]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"peak of the bulk job alone: {int(peak) / 1024:.0f} MiB")
        with Llama(TINY) as llama:
            runs = {
                "bulk job": lambda: seconds(
                    lambda: bulk(folder / "in.parquet", folder / "o", llama)
                ),
                "in memory": lambda: seconds(lambda: llama.embed_texts(texts, options=OPTIONS)),
            }
            compare("Parquet to Parquet over embed_texts", len(texts), runs, args.rounds)


if __name__ == "__main__":
    main()
