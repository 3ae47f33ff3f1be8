"""`llamacrab tune`."""

from __future__ import annotations

from pathlib import Path

import click

from llamacrab import tuning
from llamacrab._core import Model
from llamacrab._support.extras import require
from llamacrab.cli.options import CPU_BACKEND
from llamacrab.models.default import resolve


@click.command("tune")
@click.argument("path", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--length",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Mean number of tokens of the texts to measure with.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05),
    default=0.5,
    show_default=True,
    help="Shortest duration of a measurement.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Plot the results into this file.")
@click.option("--n-gpu-layers", type=int, default=-1, help="Layers on GPUs; -1: all.")
@click.option("--device", metavar="NAME", help="Tune for `Llama(devices=[NAME])`.")
@CPU_BACKEND
def tune_command(
    path: Path | None,
    length: int,
    seconds: float,
    plot: Path | None,
    n_gpu_layers: int,
    device: str | None,
    cpu_backend: str,
) -> None:
    """Measure contexts, threads, flash attention and packs for MODEL, and save the best layout."""
    tqdm = require("tqdm", extra="cli").tqdm
    on_gpu = n_gpu_layers != 0 and tuning.has_gpu(device and [device])
    with Model(
        resolve(path), n_gpu_layers=n_gpu_layers, device=device, cpu_backend=cpu_backend
    ) as model:
        n_layouts = len(list(tuning.layouts(on_gpu, model.cpu_backend)))
        n = n_layouts * len(tuning.PACKS_GPU if on_gpu else tuning.PACKS_CPU)
        click.echo(f"{n} measurements, each of {seconds} s or more", err=True)
        click.echo("contexts threads flash_attn pack_tokens  tokens/s")
        with tqdm(total=n, unit="measurement", leave=False, disable=None) as bar:

            def report(one: tuning.Measurement) -> None:
                layout = one.layout
                bar.write(
                    f"{layout.n_contexts:8} {layout.n_threads:7} {layout.flash_attn!s:>10} "
                    f"{layout.pack_tokens:11} {one.tokens_per_second:9,.0f}"
                )
                bar.update()

            found = tuning.tune(
                model, on_gpu=on_gpu, n_tokens=length, seconds=seconds, report=report
            )
        tuning.remember(model, on_gpu, found.best, n_packs=found.n_packs, noise=found.noise)
    for (n_contexts, n_threads, flash_attn), (a, b, c) in found.fits.items():
        click.echo(
            f"{n_contexts} x {n_threads}, flash_attn={flash_attn}: seconds(n tokens) = "
            f"{a:.3g} + {b:.3g} n + {c:.3g} n^2"
        )
    click.echo(f"best, and saved: {found.best}")
    if plot:
        tuning.plot(found, plot)
        click.echo(f"plot: {plot}")
