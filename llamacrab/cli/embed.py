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

# Options of `embed` that mean something only where --output is a folder.
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
    help=".npy: a matrix; .jsonl: a text and its vector a line; -: the same to standard output; "
    "without a suffix: a folder.",
)
@click.option(
    "--pooling",
    type=click.Choice(sorted(set(POOLINGS) - {"none", "rank"})),
    help="How tokens become a vector.  [default: as the model says, else mean]",
)
@click.option("--no-normalize", is_flag=True, help="Keep the length of the vectors.")
@click.option("--prompt", help="Put this before every text.")
@click.option(
    "--prompt-name",
    metavar="NAME",
    help="Put the model's own prompt of this name before every text; `info` lists them.",
)
@click.option("--dimensions", type=click.IntRange(1), help="Keep the first so many numbers.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "binary", "ubinary"]),
    default="float32",
    show_default=True,
    help="What the numbers become; binary: one bit each.",
)
@click.option("--chunk", is_flag=True, help="Average over windows of texts that are too long.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(sorted(shards.FORMATS)),
    default="parquet",
    show_default=True,
    help="Of the files, where --output is a folder.",
)
@click.option(
    "--shard-rows",
    type=click.IntRange(1),
    default=65_536,
    show_default=True,
    help="Rows a file of a folder.",
)
@click.option("--keep", multiple=True, metavar="COLUMN", help="Columns that go along.")
@click.option("--keep-text", is_flag=True, help="Put the texts into the files of a folder.")
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What to do with a row that cannot be read or embedded, where --output is a folder.",
)
@click.option(
    "--export",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Make this of a folder too: a .duckdb or .lancedb database, or a .usearch index.",
)
@click.option("--overwrite", is_flag=True, help="Begin a folder anew.")
@click.option("--append", is_flag=True, help="Embed what was added at the end of INPUT.")
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

    Files hold a text a line (.txt), a JSON object a line (.jsonl), or a table (.csv, .tsv,
    .parquet, .arrow); all but .parquet and .arrow may be compressed (.gz, .bz2, .zst).

    Where --output is a folder, the job goes on where it stopped when it is started again.
    """
    to = Path(output)
    if output != "-" and to.suffix not in ("", ".npy", ".jsonl"):
        raise click.BadParameter(
            f"{output} must end in .npy or .jsonl, or be a folder, or -", param_hint="--output"
        )
    if not to.parent.is_dir():
        raise click.BadParameter(f"there is no folder {to.parent}", param_hint="--output")
    in_folder = output != "-" and not to.suffix
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
    given = open_input(source, field, input_format, keep)
    if in_folder:
        with open_llama(model, chosen, **llama_kwargs) as llama, length_advice(llama, "--chunk"):
            _note_prompts(llama, options)
            done = embed_corpus(
                given,
                to,
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
            f"rejected, {done.n_resumed} from before, {done.seconds:.1f} s",
            err=True,
        )
        if not done.complete:
            complain("stopped: start the same command again to go on", 130)
            raise click.exceptions.Exit(130)
        return
    texts = read_texts(given, field, input_format)
    with open_llama(model, chosen, **llama_kwargs) as llama, length_advice(llama, "--chunk"):
        _note_prompts(llama, options)
        rows = np.asarray(llama.embed_texts(texts, options=options, progress=sys.stderr.isatty()))
        if output == "-":
            vectors.write_lines(sys.stdout.buffer, texts, rows)
            sys.stdout.flush()
        else:
            vectors.write(to, texts, rows, llama, options)
    where = "standard output" if output == "-" else output
    click.echo(f"{len(texts)} texts -> {where}: {dtype}, {rows.shape}", err=True)


def _refuse_folder_options(output: str) -> None:
    """Raise if an option is given that means nothing for one file."""
    context = click.get_current_context()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in FOLDER_OPTIONS and source is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"{option.opts[0]} is for a folder of files, and --output {output} is none: leave "
                f"{option.opts[0]} out, or give a name without a suffix"
            )


def _note_prompts(llama: Llama, options: EmbedOptions) -> None:
    """Say that a model has prompts where none was asked for: documents would be found less."""
    if options.prompt is None and options.prompt_name is None and llama.prompts.get("document"):
        complain(
            f"note: nothing is put before the texts, but the model has prompts: give --prompt-name "
            f"({', '.join(sorted(llama.prompts))}), document for texts to be searched; --prompt '' "
            "for none",
            0,
        )
