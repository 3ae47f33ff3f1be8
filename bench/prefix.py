"""What it is worth to compute the common beginning of prompts once: 100 documents for one query.

    python bench/prefix.py [MODEL] [--rounds 7]

MODEL is a causal reranker; by default the tiny Qwen3 of the tests, whose weights are random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from alternate import compare, seconds

from llamacrab import Llama
from llamacrab.bench.workloads import short
from llamacrab.requests.pair_template import PairTemplate

TINY = Path(__file__).resolve().parents[1] / "tests" / "data" / "tiny-qwen3-rank.gguf"
QUERY = "which animals walk sideways along the shore, and what do they eat there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=TINY)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    documents = short(100)
    with Llama(args.model) as llama:
        encoder = PairTemplate(llama.model, QUERY).tokenization(limit=llama.n_ctx, truncate=True)

        def score(share: bool) -> np.ndarray:
            job = llama._scheduler.job(encoder, len(documents), dedup=False, share=share)
            job.add(documents)
            job.seal()
            return job.wait()

        tokens = [len(encoder.tokenize(document)) for document in documents]
        print(f"{np.mean(tokens):.0f} tokens a pair; least and greatest difference of a score:")
        off = np.abs(score(True) - score(False))
        print(f"  {off.min():.1e}, {off.max():.1e}")
        runs = {
            "shared": lambda: seconds(lambda: score(True)),
            "whole": lambda: seconds(lambda: score(False)),
        }
        compare("shared beginning over none", len(documents), runs, args.rounds)


if __name__ == "__main__":
    main()
