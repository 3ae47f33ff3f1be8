"""llamacrab over llama-cpp-python built from the same source, at its defaults and at its best.

    pip install llama-cpp-python==0.3.36
    python bench/llama_cpp_python.py [--rounds 5]

Its best settings on a CPU, found by trying: one batch of many texts a call (n_batch and n_ubatch
of 512 tokens, so that a call packs texts), all CPUs, flash attention on.
"""

from __future__ import annotations

import argparse

import llama_cpp
import numpy as np
from alternate import compare, seconds

from llamacrab import Llama, fetch_default_model
from llamacrab.bench.workloads import short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=1000)
    args = parser.parse_args()
    texts = short(args.texts)
    path = str(fetch_default_model())
    common = {"embedding": True, "verbose": False}
    default = llama_cpp.Llama(path, **common)
    tuned = llama_cpp.Llama(
        path, **common, n_ctx=512, n_batch=512, n_ubatch=512, flash_attn=True, n_threads_batch=2
    )
    with Llama() as llama:
        ours = llama.embed_texts(texts[:50])
        for other in (default, tuned):
            theirs = np.array([other.embed(text, normalize=True) for text in texts[:50]])
            print(f"least cosine to ours: {(theirs * ours).sum(1).min():.6f}")

        def packed() -> None:
            for i in range(0, len(texts), 16):
                tuned.embed(texts[i : i + 16], normalize=True)

        runs = {
            "llamacrab": lambda: seconds(lambda: llama.embed_texts(texts, dedup=False)),
            "llama-cpp-python, best": lambda: seconds(packed),
            "llama-cpp-python, defaults": lambda: seconds(
                lambda: [default.embed(text, normalize=True) for text in texts]
            ),
        }
        compare("llamacrab over llama-cpp-python", len(texts), runs, args.rounds)


if __name__ == "__main__":
    main()
