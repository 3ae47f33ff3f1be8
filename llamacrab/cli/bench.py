"""`llamacrab bench`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import click

from llamacrab.cli.options import CPU_BACKEND
from llamacrab.models.default import resolve


@click.command("bench")
@click.argument("path", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="GGUF|PYTHON",
    help="Measure alternately with another model, or with another build (its python).",
)
@click.option(
    "--compare",
    "old",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="JSON",
    help="Compare with the --json file of an earlier run.",
)
@click.option(
    "--fail-under",
    type=click.FloatRange(0, min_open=True),
    metavar="RATIO",
    help="Fail if a case is certainly slower than RATIO times the speed that it is compared with.",
)
@click.option(
    "--case", "cases", multiple=True, metavar="NAME", help="Run only this; may be repeated."
)
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Runs.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.01),
    default=1.0,
    show_default=True,
    help="Approximate duration of a run.",
)
@click.option("--contexts", type=click.IntRange(0), default=0, help="n_contexts of `Llama`.")
@click.option("--threads", "-t", type=click.IntRange(0), default=0, help="n_threads.")
@click.option("--pack-tokens", type=click.IntRange(0), default=0, help="pack_tokens of `Llama`.")
@CPU_BACKEND
@click.option(
    "--json", "output", type=click.Path(path_type=Path), help="Write results to this file."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Plot the results into this file.")
def bench_command(
    path: Path | None,
    against: Path | None,
    old: Path | None,
    fail_under: float | None,
    cases: tuple[str, ...],
    rounds: int,
    seconds: float,
    contexts: int,
    threads: int,
    pack_tokens: int,
    cpu_backend: str,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Measure the speed of MODEL on this machine, and compare it with an earlier result."""
    from llamacrab.bench import report, run

    if against is not None and old is not None:
        raise click.UsageError("--against and --compare exclude each other")
    if fail_under is not None and against is None and old is None:
        raise click.UsageError("--fail-under needs something to compare with")
    before = None if old is None else json.loads(old.read_text(encoding="utf-8"))
    measure = functools.partial(
        run.run,
        resolve(path),
        against=against,
        rounds=rounds,
        seconds=seconds,
        report=lambda line: click.echo(line, err=True),
        n_contexts=contexts,
        n_threads=threads,
        pack_tokens=pack_tokens,
        # Passed only if given: the other side may be an older build without this keyword.
        **({} if cpu_backend == "auto" else {"cpu_backend": cpu_backend}),
    )
    result = measure(cases=cases)
    ratios = run.compare(result, before) if before or against else {}
    click.echo(report.table(result, ratios))
    if output:
        output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if plot:
        report.plot(result, plot)
    if fail_under is None:
        return
    slower = run.slower(ratios, fail_under, lambda names: run.compare(measure(cases=names), before))
    if slower:
        slower_cases = (
            f"{name}: {one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
            for name, one in slower.items()
        )
        raise click.ClickException(f"slower than {fail_under}: {'; '.join(slower_cases)}")
