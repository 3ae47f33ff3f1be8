"""Options that several commands share, and the `Llama` that they describe."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacrab._core import CPU_BACKENDS, PoolingType
from llamacrab.corpus import files
from llamacrab.llama import Llama

if TYPE_CHECKING:
    from collections.abc import Callable

POOLINGS = {pooling.name.lower(): pooling for pooling in PoolingType if pooling >= 0}

CPU_BACKEND = click.option(
    "--cpu-backend",
    type=click.Choice(CPU_BACKENDS),
    default="auto",
    show_default=True,
    help="Kernels on a CPU: llamacrab's, or ggml's; int8: llamacrab's with 8-bit products.",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the model and for reading the texts."""

    @functools.wraps(command)
    def merged(*, truncate: bool, truncate_side: str | None, **others: Any) -> None:
        command(truncate=truncate_side or truncate, **others)

    for option in (
        click.option(
            "--model",
            "-m",
            type=click.Path(path_type=Path),
            metavar="GGUF",
            help="Model file.  [default: all-MiniLM-L6-v2, fetched on first use]",
        ),
        click.option(
            "--n-ctx",
            type=click.IntRange(0),
            default=0,
            help="Tokens of the longest text; 0: as the model was trained.",
        ),
        click.option(
            "--threads",
            "-t",
            type=click.IntRange(0),
            default=0,
            help="CPUs to use in all; 0: all that this process may use.",
        ),
        click.option("--n-gpu-layers", type=int, default=-1, help="Layers on GPUs; -1: all."),
        CPU_BACKEND,
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="NAME",
            help="Put a copy of the model on this device; may be repeated. `info --devices` lists "
            "the devices.",
        ),
        click.option("--truncate", is_flag=True, help="Cut texts that are too long."),
        click.option(
            "--truncate-side",
            type=click.Choice(["end", "start", "middle"]),
            help="Where to cut texts that are too long; --truncate cuts at the end.",
        ),
        click.option(
            "--field",
            metavar="NAME",
            default="text",
            show_default=True,
            help="Field of a JSON line, or column of a table, that holds the text.",
        ),
        click.option(
            "--input-format",
            type=click.Choice(files.KINDS),
            help="Format of the input.  [default: by its name; lines for -]",
        ),
    ):
        merged = option(merged)
    return merged


def open_llama(
    model: Path | None,
    pooling: PoolingType,
    *,
    answers: tuple[str, ...] | None = None,
    template: str | None = None,
    **llama_kwargs: Any,
) -> Llama:
    """Return the model that these options describe."""
    return Llama(
        model,
        pooling_type=pooling,
        answers=answers,
        template=template,
        n_ctx=llama_kwargs["n_ctx"],
        n_cpus=llama_kwargs["threads"],
        n_gpu_layers=llama_kwargs["n_gpu_layers"],
        cpu_backend=llama_kwargs["cpu_backend"],
        devices=llama_kwargs["devices"] or None,
    )
