"""From what run.py found to a page, after the pattern page.md, and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llamacrab.bench.statistics import Ratio, paired

BASE = "llamacrab"
OURS, OTHERS = "#c2452d", "#8c9aa8"
WORKLOADS = {"short": "Short texts", "mixed": "Mixed texts"}
LENGTHS = {"short": "of about 18 tokens", "mixed": "of 15 to 512 tokens, 139 on average"}

PAGE = Path(__file__).resolve().with_name("page.md")


def _rate(rates: list[float]) -> str:
    return f"{np.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _ratios(workload: dict[str, Any]) -> dict[str, Ratio]:
    ours = workload["peers"][BASE]["rates"]
    return {
        name: paired(ours, peer["rates"])
        for name, peer in workload["peers"].items()
        if name != BASE
    }


def _by_rate(workload: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    peers: dict[str, dict[str, Any]] = workload["peers"]
    return sorted(peers.items(), key=lambda item: -float(np.median(item[1]["rates"])))


def _cosine(value: float) -> str:
    return f"{value:.6f}"


def cpu_class(result: dict[str, Any]) -> str:
    """Return the class of the machine's CPU, as the kernels that llamacrab takes there name it."""
    return str(result["machine"].get("kernels") or "other").replace("_", "-")


def tables(result: dict[str, Any]) -> str:
    """Return a Markdown table for each workload, the fastest first."""
    blocks = []
    for name, workload in result["workloads"].items():
        ratios = _ratios(workload)
        lines = [
            f"## {WORKLOADS.get(name, name)}",
            "",
            "| | Texts/s (least to greatest) | llamacrab / peer | Least cosine | Median cosine |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for peer, found in _by_rate(workload):
            ratio = ratios.get(peer)
            over = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
            cosine = found["cosine"]
            label = f"**{peer}**" if peer.startswith(BASE) else peer
            lines.append(
                f"| {label} | {_rate(found['rates'])} | {over} "
                f"| {_cosine(cosine['least'])} | {_cosine(cosine['median'])} |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def losses(result: dict[str, Any]) -> str:
    """Return who is faster than llamacrab, on what, and by how much."""
    lines = []
    for name, workload in result["workloads"].items():
        ratios = _ratios(workload)
        where = WORKLOADS.get(name, name)
        ratios = {peer: r for peer, r in ratios.items() if not peer.startswith(BASE)}
        faster = sorted((r.value, peer) for peer, r in ratios.items() if r.is_below(1))
        for value, peer in faster:
            cosine = workload["peers"][peer]["cosine"]["least"]
            lines.append(
                f"- {where}: {peer} is {1 / value:.2f} times as fast; its least cosine is "
                f"{_cosine(cosine)}."
            )
        even = [peer for peer, r in ratios.items() if r.low <= 1 <= r.high]
        if even:
            lines.append(f"- {where}: no significant difference from {', '.join(even)}.")
        if not faster:
            lines.append(f"- {where}: no peer is significantly faster.")
    return "\n".join(lines)


def settings(result: dict[str, Any]) -> str:
    """Return a Markdown table of versions and settings."""
    lines = ["| | Version | Settings |", "| --- | --- | --- |"]
    for name, version in result["about"].items():
        said = {
            workload: found["peers"][name]["settings"]
            for workload, found in result["workloads"].items()
        }
        if len(set(said.values())) > 1:
            text = "; ".join(f"{workload}: {how}" for workload, how in said.items())
        else:
            text = next(iter(said.values()))
        lines.append(f"| {name} | {version} | {text} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the rates as bars, from the least to the greatest of the rounds as a line."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "llamacrab", "svg.fonttype": "none"})
    from matplotlib import pyplot

    n = len(result["workloads"])
    height = 0.9 + 0.32 * len(result["about"])
    figure, axes = pyplot.subplots(1, n, figsize=(5.2 * n, height), squeeze=False)
    for axis, (name, workload) in zip(axes[0], result["workloads"].items(), strict=True):
        shown = _by_rate(workload)[::-1]
        rates = [peer["rates"] for _, peer in shown]
        middle = np.array([np.median(each) for each in rates])
        spread = [middle - [min(each) for each in rates], [max(each) for each in rates] - middle]
        colours = [OURS if label.startswith(BASE) else OTHERS for label, _ in shown]
        axis.barh([label for label, _ in shown], middle, xerr=spread, color=colours, ecolor="#333")
        axis.set_title(f"{WORKLOADS.get(name, name)} {LENGTHS.get(name, '')}", fontsize=10)
        axis.set_xlabel("texts/s")
        axis.tick_params(axis="y", labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, and the plot into the folder `images` beside it."""
    image = path.parent / "images" / f"{path.stem}.svg"
    plot(result, image)
    found = result["workloads"]
    gemm = np.concatenate([workload["gemm"] for workload in found.values()]) / 1e9
    rounds = {len(workload["gemm"]) for workload in found.values()}
    counts = [f"{w['n']:,} {LENGTHS.get(name, name)}" for name, w in found.items()]
    text = PAGE.read_text(encoding="utf-8").format(
        tables=tables(result),
        plot=image.relative_to(path.parent).as_posix(),
        reference=result["reference"],
        losses=losses(result),
        cpu=result["machine"]["cpu"],
        cpu_class=cpu_class(result),
        page=path.name,
        cpus=result["machine"]["cpus"],
        gemm=f"{np.median(gemm):,.0f} ({gemm.min():,.0f} to {gemm.max():,.0f})",
        source=result["texts"],
        workloads=" and ".join(counts),
        rounds=rounds.pop(),
        settings=settings(result),
    )
    path.write_text(text, encoding="utf-8")
