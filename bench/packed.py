"""Packed `embed_texts` over one `embed` call a text, in one process, in turn.

python bench/packed.py [--rounds 5]
"""

from __future__ import annotations

import argparse

from alternate import compare, seconds

from llamacrab import Llama
from llamacrab.bench.workloads import short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    texts = short(1000)
    for n_contexts, n_threads in ((2, 1), (1, 2)):
        with Llama(n_contexts=n_contexts, n_threads=n_threads) as llama:
            tokens = sum(len(llama.model.vocab.tokenize(text)) for text in texts)
            print(f"{tokens / len(texts):.1f} tokens a text, {n_contexts} contexts x {n_threads}")
            runs = {
                "embed_texts": lambda llama=llama: seconds(
                    lambda: llama.embed_texts(texts, dedup=False)
                ),
                "embed, text by text": lambda llama=llama: seconds(
                    lambda: [llama.embed(text) for text in texts]
                ),
            }
            compare("packed over one by one", len(texts), runs, args.rounds)


if __name__ == "__main__":
    main()
