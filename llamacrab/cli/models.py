"""`llamacrab info`, `fetch` and `convert`: model files."""

from __future__ import annotations

from pathlib import Path

import click

from llamacrab import tuning
from llamacrab._core import Model, devices, kernels
from llamacrab.cli.options import POOLINGS
from llamacrab.models.convert import OUTTYPES, convert
from llamacrab.models.default import default_model_path, fetch_default_model, resolve
from llamacrab.requests.prompts import prompts_of
from llamacrab.requests.reranker_families import family_of


@click.command()
@click.argument("path", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option("--devices", "show_devices", is_flag=True, help="Show the devices of this machine.")
def info(path: Path | None, show_devices: bool) -> None:
    """Show what a GGUF is, and how it would be used."""
    if show_devices:
        for device in devices():
            if device["type"] == "ACCEL":
                continue  # helps the CPU; no place for a model
            memory = f"{device['memory_free'] / 2**30:.1f} of {device['memory_total'] / 2**30:.1f}"
            click.echo(
                f"{device['name']:10} {device['type']:6} {memory} GiB free  {device['description']}"
            )
        return
    with Model(resolve(path)) as model:
        rows = {
            "path": model.path,
            "model": model.desc,
            "name": model.metadata.get("general.name", "-"),
            "architecture": model.arch,
            "parameters": f"{model.n_params:,}",
            "size": f"{model.size / 2**20:.1f} MiB",
            "dimensions": model.n_embd_out,
            "longest text": f"{model.n_ctx_train} tokens",
            "layers": f"{model.n_layer}, {model.n_head} heads",
            "pooling": model.pooling_type.name.lower(),
            "rank head": f"{model.n_cls_out} {model.cls_labels}" if model.has_rank_head else "no",
            "rerank template": "yes" if model.chat_template("rerank") else "no",
            "vocabulary": f"{model.vocab.segment_b_offset or model.vocab.n_tokens} tokens, "
            f"{model.vocab.vocab_type.name}"
            + (", and again for the document" if model.vocab.segment_b_offset else ""),
            "special tokens": f"{_pieces(model, model.vocab.prefix_ids)} text "
            f"{_pieces(model, model.vocab.suffix_ids)}".strip(),
        }
        if not model.has_rank_head and (family := family_of(model)) is not None:
            rows["reranks by"] = f"its answers {', '.join(family.answers)} ({family.name})"
        prompts = prompts_of(model.metadata)
        rows |= {f"prompt {name}": repr(prompt) for name, prompt in prompts.items()}
        if not prompts:
            rows["prompts"] = "none known"
        rows |= _layout_rows(model)
    for name, value in rows.items():
        click.echo(f"{name:16} {value}")


def _layout_rows(model: Model) -> dict[str, str]:
    """Return how `Llama` would compute, and where each number comes from."""
    on_gpu = tuning.has_gpu()
    entry = tuning.recall(model, on_gpu)
    known, unsaid = None if entry is None else entry.layout, tuning.Layout()
    used = tuning.choose(known, on_gpu=on_gpu, given=unsaid, cpu_backend=model.cpu_backend)
    sources = tuning.sources(known, given=unsaid, measured=str(entry or ""))
    names = {
        "n_contexts": "contexts",
        "n_threads": "threads each",
        "pack_tokens": "tokens per pack",
        "flash_attn": "flash attention",
    }
    return {label: f"{getattr(used, name)} ({sources[name]})" for name, label in names.items()} | {
        "CPU backend": _backend_of(model)
    }


def _backend_of(model: Model) -> str:
    """Return what computes on the CPU, and why."""
    used = model.cpu_backend if model.cpu_backend == "ggml" else f"{model.cpu_backend} {kernels()}"
    return f"{used} ({model.cpu_backend_reason})"


def _pieces(model: Model, tokens: tuple[int, ...]) -> str:
    return " ".join(model.vocab.token_to_piece(i).decode("utf-8", "replace") for i in tokens)


@click.command()
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    help="Type of the matrices.  [default: bf16 if the CPU multiplies bf16, else f16]",
)
@click.option("--force", is_flag=True, help="Convert again even if the file exists.")
def fetch(outtype: str | None, force: bool) -> None:
    """Fetch the default model, for later use without a network."""
    exists = default_model_path(outtype).is_file() and not force
    path = fetch_default_model(outtype, overwrite=force)
    click.echo(f"{path} ({'already there' if exists else 'fetched'})")


@click.command("convert")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The GGUF.")
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default="bf16",
    show_default=True,
    help="Type of the matrices.",
)
@click.option(
    "--pooling",
    type=click.Choice(sorted(set(POOLINGS) - {"none", "rank"})),
    help="Pooling; by default what FOLDER says, or that of its family.",
)
def convert_command(folder: Path, output: Path, outtype: str, pooling: str | None) -> None:
    """Convert a sentence-transformers BERT FOLDER into a GGUF."""
    click.echo(convert(folder, output, outtype=outtype, pooling=pooling))
