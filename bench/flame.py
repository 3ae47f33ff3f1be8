"""Where the time of a bulk job goes: a flame graph from perf, and the shares of its functions.

    python bench/flame.py [-o flame.svg] [--model GGUF] [--workload short|mixed|long]

Needs Linux's `perf` (Debian's package `linux-perf`) and the extra `plot`. A bar's width is the
share of samples in which its function ran, or waited for what it had called.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

WORK = """
import sys
from llamacrab import Llama
from llamacrab.bench import workloads
texts = getattr(workloads, sys.argv[2])(int(sys.argv[3]))
with Llama(sys.argv[1] or None) as llama:
    for _ in range(3):
        llama.embed_texts(texts, truncate=True, dedup=False)
"""
N_TEXTS = {"short": 2000, "mixed": 500, "long": 100}
# A worker's stack is drawn from here on: above it, perf seldom finds its way.
FIRST = ("llama_context::process_ubatch", "llamacrab::scheduler::")
# Bars of less than this share are left out.
LEAST = 0.004


def record(model: str, workload: str, folder: Path) -> str:
    """Return what perf has to say of every sample."""
    data = folder / "perf.data"
    command = ["perf", "record", "-q", "-F", "199", "--call-graph", "dwarf,16384", "-o", str(data)]
    work = [sys.executable, "-c", WORK, model, workload, str(N_TEXTS[workload])]
    subprocess.run([*command, "--", *work], check=True)
    script = ["perf", "script", "-i", str(data), "--no-inline", "-F", "comm,ip,sym"]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout


def fold(samples: str) -> Counter[tuple[str, ...]]:
    """Return how often each stack of a worker was seen, its outermost function first."""
    found: Counter[tuple[str, ...]] = Counter()
    for sample in samples.split("\n\n"):
        lines = [line.strip().partition(" ")[2] for line in sample.splitlines()[1:]]
        stack = [short_name(line) for line in reversed(lines) if line]
        starts = [i for i, name in enumerate(stack) if name.startswith(FIRST)]
        if starts:
            found[tuple(stack[starts[0] :])] += 1
    return found


def short_name(symbol: str) -> str:
    """Return a function's name without its arguments and the arguments of its template."""
    symbol = symbol.replace("(anonymous namespace)::", "")
    while "<" in symbol and ">" in symbol:
        shorter = re.sub(r"<[^<>]*>", "", symbol)
        if shorter == symbol:
            break
        symbol = shorter
    return re.sub(r"\(.*|^\S+ (?=\S+$)|\.(cold|isra|part|constprop|lto_priv|_omp_fn).*", "", symbol)


def draw(stacks: Counter[tuple[str, ...]], path: Path, title: str) -> None:
    """Draw the stacks as bars upon bars."""
    total = sum(stacks.values())
    figure, axes = pyplot.subplots(figsize=(12, 6))
    deepest = 0

    def bars(stacks: Counter[tuple[str, ...]], left: float, depth: int) -> None:
        nonlocal deepest
        under: dict[str, Counter[tuple[str, ...]]] = {}
        for stack, n in stacks.items():
            if stack:
                under.setdefault(stack[0], Counter())[stack[1:]] += n
        for name, rest in sorted(under.items()):
            width = sum(rest.values()) / total
            if width < LEAST:
                left += width
                continue
            deepest = max(deepest, depth)
            colour = pyplot.cm.autumn(0.25 + 0.6 * (hash_of(name) % 97) / 97)
            axes.barh(depth, width, 0.95, left, color=colour, edgecolor="white", linewidth=0.3)
            room = int(width * 150)
            if room > 3:
                label = f"{name} {width:.0%}" if room > len(name) + 5 else name[:room]
                axes.text(left + 0.002, depth, label, va="center", fontsize=7, clip_on=True)
            bars(rest, left, depth + 1)
            left += width

    bars(stacks, 0.0, 0)
    axes.set(xlim=(0, 1), ylim=(-0.6, deepest + 0.6), title=title)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path)


def hash_of(name: str) -> int:
    """Return a number that is the same in every run."""
    return sum(i * ord(letter) for i, letter in enumerate(name, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", "-o", type=Path, default=Path("flame.svg"))
    parser.add_argument("--model", default="")
    parser.add_argument("--workload", choices=N_TEXTS, default="short")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stacks = fold(record(args.model, args.workload, Path(folder)))
    draw(stacks, args.output, f"{args.workload} texts, {Path(args.model).name or 'default model'}")
    total = sum(stacks.values())
    shares: Counter[str] = Counter()
    for stack, n in stacks.items():
        shares[stack[-1]] += n
    for name, n in shares.most_common(12):
        print(f"{n / total:6.1%}  {name}")


if __name__ == "__main__":
    main()
