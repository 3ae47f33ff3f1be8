"""`llamacrab embed`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from llamacrab._core import PoolingType
from llamacrab.cli.inputs import open_input, read_texts
from llamacrab.cli.messages import complain, length_advice
from llamacrab.cli.options import POOLINGS, model_options, open_llama
from llamacrab.corpus import embed_corpus, shards, vectors
from llamacrab.options import EmbedOptions

if TYPE_CHECKING:
    from llamacrab.llama import Llama
    from llamacrab.options import Truncate

# Options of `embed` that need a folder as --output.
FOLDER_OPTIONS = (
    "kind",
    "shard_rows",
    "keep",
    "keep_text",
    "on_error",
    "export",
    "overwrite",
    "append",
    "json_progress",
)


@click.command()
@click.argument("source", metavar="INPUT")
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(allow_dash=True),
    help=".npy: a matrix; .jsonl: one text and its embedding per line; -: the same to standard "
    "output; without a suffix: a folder.",
)
@click.option(
    "--pooling",
    type=click.Choice(sorted(set(POOLINGS) - {"none", "rank"})),
    help="How the rows of tokens become an embedding.  [default: as the model says, else mean]",
)
@click.option("--no-normalize", is_flag=True, help="Do not normalize the embeddings.")
@click.option("--prompt", help="Put this before every text.")
@click.option(
    "--prompt-name",
    metavar="NAME",
    help="Put the model's own prompt of this name before every text; `info` lists them.",
)
@click.option("--dimensions", type=click.IntRange(1), help="Keep this many numbers per embedding.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "binary", "ubinary"]),
    default="float32",
    show_default=True,
    help="Type of the numbers; binary: one bit per number.",
)
@click.option("--chunk", is_flag=True, help="Average over windows of texts that are too long.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(sorted(shards.FORMATS)),
    default="parquet",
    show_default=True,
    help="Format of the files, if --output is a folder.",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(1),
    default=65_536,
    show_default=True,
    help="Rows per file of a folder.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="COLUMN",
    help="Column to copy into the files of a folder; may be repeated.",
)
@click.option("--keep-text", is_flag=True, help="Write the texts into the files of a folder.")
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What to do with a row that cannot be read or embedded, if --output is a folder.",
)
@click.option(
    "--export",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Export a folder to this .duckdb or .lancedb database, or .usearch index; repeatable.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier job in the folder.")
@click.option("--append", is_flag=True, help="Embed rows that were added at the end of INPUT.")
@click.option("--json-progress", is_flag=True, help="Print progress as lines of JSON.")
@model_options
def embed(
    source: str,
    output: str,
    pooling: str | None,
    no_normalize: bool,
    prompt: str | None,
    prompt_name: str | None,
    dimensions: int | None,
    dtype: str,
    chunk: bool,
    kind: Literal["parquet", "arrow", "npy", "jsonl"],
    shard_rows: int,
    keep: tuple[str, ...],
    keep_text: bool,
    on_error: Literal["fail", "skip"],
    export: tuple[Path, ...],
    overwrite: bool,
    append: bool,
    json_progress: bool,
    model: Path | None,
    truncate: Truncate,
    field: str,
    input_format: str | None,
    **llama_kwargs: Any,
) -> None:
    """Embed every text of INPUT: a file, a glob, or - for standard input.

    Files hold one text per line (.txt), one JSON object per line (.jsonl), or a table (.csv, .tsv,
    .parquet, .arrow); all but .parquet and .arrow may be compressed (.gz, .bz2, .zst).

    If --output is a folder, run the same command again to resume an interrupted job.
    """
    path = Path(output)
    if output != "-" and path.suffix not in ("", ".npy", ".jsonl"):
        raise click.BadParameter(
            f"{output} must end in .npy or .jsonl, or be a folder, or -", param_hint="--output"
        )
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}", param_hint="--output")
    in_folder = output != "-" and not path.suffix
    if not in_folder:
        _refuse_folder_options(output)
    chosen = POOLINGS[pooling] if pooling else PoolingType.UNSPECIFIED
    options = EmbedOptions(
        normalize=not no_normalize,
        truncate=truncate,
        prompt=prompt,
        prompt_name=prompt_name,
        dimensions=dimensions,
        dtype=dtype,
        chunk=chunk,
    )
    data = open_input(source, field, input_format, keep)
    if in_folder:
        with open_llama(model, chosen, **llama_kwargs) as llama, length_advice(llama, "--chunk"):
            _note_prompts(llama, options)
            done = embed_corpus(
                data,
                path,
                llama,
                text=field,
                input_format=input_format,
                keep=keep,
                keep_text=keep_text,
                format=kind,
                shard_rows=shard_rows,
                options=options,
                on_error=on_error,
                export=export,
                overwrite=overwrite,
                append=append,
                progress=sys.stderr.isatty() and not json_progress,
                on_progress=(lambda state: click.echo(json.dumps(state)))
                if json_progress
                else None,
            )
        click.echo(
            f"{done.n_rows} texts in {done.n_shards} files -> {output}; {done.n_rejected} "
            f"rejected, {done.n_resumed} from earlier runs, {done.seconds:.1f} s",
            err=True,
        )
        if not done.complete:
            complain("interrupted: run the same command again to resume", 130)
            raise click.exceptions.Exit(130)
        return
    texts = read_texts(data, field, input_format)
    with open_llama(model, chosen, **llama_kwargs) as llama, length_advice(llama, "--chunk"):
        _note_prompts(llama, options)
        rows = np.asarray(llama.embed_texts(texts, options=options, progress=sys.stderr.isatty()))
        if output == "-":
            vectors.write_lines(sys.stdout.buffer, texts, rows)
            sys.stdout.flush()
        else:
            vectors.write(path, texts, rows, llama, options)
    where = "standard output" if output == "-" else output
    click.echo(f"{len(texts)} texts -> {where}: {dtype}, {rows.shape}", err=True)


def _refuse_folder_options(output: str) -> None:
    """Raise if an option is given that needs a folder."""
    context = click.get_current_context()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in FOLDER_OPTIONS and source is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"{option.opts[0]} is for a folder of files, but --output {output} is not one: "
                f"leave {option.opts[0]} out, or give a name without a suffix"
            )


def _note_prompts(llama: Llama, options: EmbedOptions) -> None:
    """Print a note if a model has prompts and none is used: searches would find less."""
    if options.prompt is None and options.prompt_name is None and llama.prompts.get("document"):
        complain(
            f"note: no prompt is used, but the model has prompts: give --prompt-name "
            f"({', '.join(sorted(llama.prompts))}), document for texts to search in; --prompt '' "
            "for none",
            0,
        )
