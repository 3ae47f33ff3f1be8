"""Decoders: llamacrab beside llama-cpp-python and transformers, in turn, in own processes.

    python bench/decoders.py model.gguf --peers-python PYTHON [--tokens 100 500] [--transformers]

PYTHON is an interpreter with llama-cpp-python, and for `--transformers` torch, transformers, gguf
and accelerate, such as that of the environment of bench/peers/run.py. The vectors of all must be
those of the first peer. Pooling is LAST.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

from run import Peer, measure  # noqa: E402

from llamacrab import Model  # noqa: E402
from llamacrab.bench.workloads import short  # noqa: E402
from llamacrab.tuning import usable_cpus  # noqa: E402

CPUS = usable_cpus()
LAST = 3  # llama.cpp's number of this pooling


def texts_of(model: Model, n_tokens: int, count: int) -> list[str]:
    """Return texts of nearly `n_tokens` tokens."""
    rng, lines = random.Random(0), short(1000)
    texts = []
    for _ in range(count):
        text = " ".join(rng.sample(lines, min(len(lines), n_tokens)))
        low, high = 1, len(text)
        while low < high:  # the longest beginning that fits
            middle = (low + high + 1) // 2
            fits = len(model.vocab.tokenize(text[:middle])) <= n_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        texts.append(text[:low])
    return texts


def peers(with_transformers: bool) -> dict[str, Peer]:
    """Return what is compared, llamacrab first."""
    file = {"outtype": "model"}
    ours = {**file, "pooling_type": "last"}
    lcp = {**file, "pooling_type": LAST, "n_threads": CPUS, "n_threads_batch": CPUS}
    packed = {"n_ctx": 1024, "n_batch": 1024, "n_ubatch": 512, "flash_attn": True, "batch": 8}
    found = {
        "llamacrab": Peer("with_llamacrab.py", "", ours, is_ours=True),
        "llamacrab int8": Peer(
            "with_llamacrab.py", "", {**ours, "cpu_backend": "int8"}, is_ours=True
        ),
        "llamacrab on ggml's kernels": Peer(
            "with_llamacrab.py", "", {**ours, "cpu_backend": "ggml"}, is_ours=True
        ),
        "llama-cpp-python, packed": Peer("with_llama_cpp_python.py", "", {**lcp, **packed}),
        "llama-cpp-python, one by one": Peer(
            "with_llama_cpp_python.py", "", {**lcp, "n_ctx": 1024, "flash_attn": True}
        ),
    }
    if with_transformers:
        how = {**file, "n_threads": CPUS}
        sizes = {name: {"batch": 4} for name in ("100", "500")}
        for dtype in ("float32", "bfloat16"):
            found[f"transformers {dtype}"] = Peer(
                "with_transformers.py", "", {**how, "dtype": dtype}, sizes
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers-python", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 500], choices=[100, 500])
    parser.add_argument("--total", type=int, default=1000, help="tokens of all texts together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--leave-out", action="append", default=[], metavar="NAME")
    args = parser.parse_args()
    with Model(args.model, cpu_backend="ggml") as model:
        texts = {str(n): texts_of(model, n, max(2, args.total // n)) for n in args.tokens}
        n_tokens = {
            n: sum(len(model.vocab.tokenize(text)) for text in chosen)
            for n, chosen in texts.items()
        }
    chosen = {
        name: peer for name, peer in peers(args.transformers).items() if name not in args.leave_out
    }
    files = {"gguf model": str(args.model.resolve())}
    result = measure(chosen, files, texts, args.rounds, args.peers_python)
    print(f"{args.model.name} on {result['machine']}")
    for n, workload in result["workloads"].items():
        base = workload["peers"]["llamacrab"]["rates"]
        print(f"{len(texts[n])} texts of {n} tokens")
        for name, here in workload["peers"].items():
            ratios = sorted(a / b for a, b in zip(base, here["rates"], strict=True))
            rate = statistics.median(here["rates"]) * n_tokens[n] / len(texts[n])
            print(
                f"  {name:30} {rate:7.0f} tokens/s   llamacrab / it "
                f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                f"   least cosine {here['cosine']['least']:.5f}"
            )


if __name__ == "__main__":
    main()
