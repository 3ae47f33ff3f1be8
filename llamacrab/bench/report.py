"""Show a result as a table or as a plot."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from llamacrab._support.extras import require
from llamacrab.bench.statistics import Ratio


def table(result: dict[str, Any], ratios: dict[str, Ratio] | None = None) -> str:
    """Return a table of the results, and of the machine and models they were measured on."""
    lines = [
        f"{result['machine']['cpu']}, {result['machine']['cpus']} CPUs; {result['texts']}",
    ]
    for side in result["sides"]:
        about, layout = side["about"], side["about"]["layout"]
        rss = "?" if side["peak_rss"] is None else f"{side['peak_rss'] / 2**20:.0f} MiB"
        lines += [
            "",
            f"{side['label']}: {about['model']}",
            f"{about['desc']}; {layout['n_contexts']} x {layout['n_threads']} threads, packs of "
            f"{layout['pack_tokens']} tokens; peak memory {rss}",
            f"{'':10} {'per s':>10} {'from':>10} {'to':>10} {'tokens/s':>10} {'of GEMM':>8} "
            f"{'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8}",
        ]
        lines += [_row(name, case) for name, case in side["cases"].items()]
    if ratios:
        lines += ["", f"{'ratio':10} {'':>10} {'from':>10} {'to':>10}"]
        lines += [
            f"{name:10} {one.value:10.3f} {one.low:10.3f} {one.high:10.3f}"
            for name, one in ratios.items()
        ]
    return "\n".join(lines)


def _row(name: str, case: dict[str, Any]) -> str:
    rates = case["rates"]
    row = f"{name:10} {median(rates):10,.1f} {min(rates):10,.1f} {max(rates):10,.1f}"
    row += f" {case['tokens_per_second']:10,.0f}" if case["n_tokens"] else f" {'':10}"
    row += f" {case['gemm_share']:8.1%}" if case["n_tokens"] and name != "tokenize" else f" {'':8}"
    for value in (case["latency_ms"] or {}).values():
        row += f" {value:8.2f}"
    return row.rstrip()


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot tokens per second of every case, one bar per side (extra ``plot``)."""
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("agg")
    figure, axes = require("matplotlib.pyplot", extra="plot").subplots(figsize=(7, 4))
    sides = result["sides"]
    names = [name for name, case in sides[0]["cases"].items() if case["n_tokens"]]
    names = [name for name in names if name != "tokenize"]
    height = 0.8 / len(sides)
    for k, side in enumerate(sides):
        rates = [side["cases"][name]["tokens_per_second"] for name in names]
        places = [i + k * height for i in range(len(names))]
        axes.barh(places, rates, height, label=side["label"])
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names)
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second", title=Path(sides[0]["about"]["model"]).name)
    if len(sides) > 1:
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
