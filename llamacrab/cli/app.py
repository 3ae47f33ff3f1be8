"""The command line: `llamacrab embed | rerank | search | info | tune | fetch | convert ...`."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click
import numpy as np

from llamacrab import tuning
from llamacrab._core import CPU_BACKENDS, Model, PoolingType, devices
from llamacrab._support.extras import require
from llamacrab._support.versions import __version__, show_versions
from llamacrab.corpus import embed_corpus, files, shards, vectors
from llamacrab.corpus.sources import Source
from llamacrab.errors import CorpusError, LlamaError, TextTooLongError
from llamacrab.llama import Llama
from llamacrab.models.convert import OUTTYPES, convert
from llamacrab.models.default import default_model_path, fetch_default_model, resolve
from llamacrab.options import EmbedOptions
from llamacrab.requests.prompts import prompts_of
from llamacrab.similarity import semantic_search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from llamacrab.options import Truncate
    from llamacrab.requests.reranking import Activation

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
POOLINGS = {pooling.name.lower(): pooling for pooling in PoolingType if pooling >= 0}


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on standard error."""
    warnings.showwarning = _show_warning
    logging.getLogger("llamacrab._diagnostics").addHandler(_DOUBTS)
    try:
        # Asked for nothing, it says what it can do.
        arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        return main(arguments, prog_name="llamacrab", standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        return _complain(error.format_message(), 2)
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.ClickException, LlamaError, OSError, ValueError) as error:
        return _complain(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)


class _Doubts(logging.Handler):
    """Shows what is doubtful about a model, as a logging application would."""

    def emit(self, record: logging.LogRecord) -> None:
        _complain(f"warning: {record.getMessage()}", 0)


_DOUBTS = _Doubts()


def _show_warning(message: Warning | str, *where: object, **how: object) -> None:
    _complain(f"warning: {message}", 0)


def _complain(message: str, code: int) -> int:
    click.echo(f"llamacrab: {' '.join(message.split())}", err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="llamacrab %(version)s")
def main() -> None:
    """Embedding and reranking with GGUF models."""


_CPU_BACKEND = click.option(
    "--cpu-backend",
    type=click.Choice(CPU_BACKENDS),
    default="auto",
    show_default=True,
    help="Kernels on a CPU: llamacrab's own, or ggml's; int8: the former with 8-bit products.",
)


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which model computes, and how."""

    @functools.wraps(command)
    def merged(*, truncate: bool, truncate_side: str | None, **given: Any) -> None:
        command(truncate=truncate_side or truncate, **given)

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
        _CPU_BACKEND,
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="NAME",
            help="Put a copy of the model on this device, and on every other that is named; "
            "`info --devices` lists them.",
        ),
        click.option("--truncate", is_flag=True, help="Cut texts that are too long."),
        click.option(
            "--truncate-side",
            type=click.Choice(["end", "start", "middle"]),
            help="Cut them there: --truncate is --truncate-side end.",
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
            help="What the input holds.  [default: what its name says; lines for -]",
        ),
    ):
        merged = option(merged)
    return merged


def _open(model: Path | None, pooling: PoolingType, **sizes: Any) -> Llama:
    return Llama(
        model,
        pooling_type=pooling,
        n_ctx=sizes["n_ctx"],
        n_cpus=sizes["threads"],
        n_gpu_layers=sizes["n_gpu_layers"],
        cpu_backend=sizes["cpu_backend"],
        devices=sizes["devices"] or None,
    )


@main.command()
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
@_model_options
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
    **sizes: Any,
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
    given = _input(source, field, input_format, keep)
    if in_folder:
        with _open(model, chosen, **sizes) as llama, _advising(llama, "--chunk"):
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
            _complain("stopped: start the same command again to go on", 130)
            raise click.exceptions.Exit(130)
        return
    texts = _texts(given, field, input_format)
    with _open(model, chosen, **sizes) as llama, _advising(llama, "--chunk"):
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
        _complain(
            f"note: nothing is put before the texts, but the model has prompts: give --prompt-name "
            f"({', '.join(sorted(llama.prompts))}), document for texts to be searched; --prompt '' "
            "for none",
            0,
        )


@main.command()
@click.argument("query")
@click.argument("source", metavar="DOCUMENTS")
@click.option("--top-k", "-k", type=click.IntRange(1), help="Show the best so many only.")
@click.option(
    "--activation",
    type=click.Choice(["none", "sigmoid", "softmax"]),
    default="none",
    show_default=True,
    help="What to apply to the model's outputs.",
)
@_model_options
def rerank(
    query: str,
    source: str,
    top_k: int | None,
    activation: Activation,
    model: Path | None,
    truncate: Truncate,
    field: str,
    input_format: str | None,
    **sizes: Any,
) -> None:
    """Sort the texts of DOCUMENTS by how well they answer QUERY; needs a reranker as --model.

    A model with several classes gives its score for each, a line a document, unsorted.
    """
    if model is None:
        raise click.UsageError("rerank needs --model, the GGUF of a reranker")
    documents = _texts(_input(source, field, input_format), field, input_format)
    with _open(model, PoolingType.RANK, **sizes) as llama, _advising(llama, what="document"):
        scores = llama.rerank(query, documents, activation=activation, truncate=truncate)
        labels = llama.labels
    if scores.ndim == 1:
        for i in np.argsort(-scores, kind="stable")[:top_k]:
            click.echo(f"{scores[i]:.4f}\t{_one_line(documents[i])}")
        return
    if top_k is not None:
        raise click.ClickException(f"{scores.shape[1]} classes give no order: leave out --top-k")
    for row, document in zip(scores, documents, strict=True):
        shown = [f"{label}={score:.4f}" for label, score in zip(labels, row, strict=True)]
        click.echo("\t".join([*shown, _one_line(document)]))


@main.command()
@click.argument("source", metavar="CORPUS")
@click.argument("query")
@click.option(
    "--top-k", "-k", type=click.IntRange(1), default=5, show_default=True, help="How many to show."
)
@click.option(
    "--vectors",
    "kept_in",
    type=click.Path(path_type=Path, exists=True),
    help="The corpus's vectors, as `embed` wrote them: .npy, .jsonl, or a folder.",
)
@click.option("--prompt", help="Put this before the query, instead of the model's own prompt.")
@click.option("--prompt-name", metavar="NAME", help="Put the model's prompt of this name there.")
@_model_options
def search(
    source: str,
    query: str,
    top_k: int,
    kept_in: Path | None,
    prompt: str | None,
    prompt_name: str | None,
    model: Path | None,
    truncate: Truncate,
    field: str,
    input_format: str | None,
    **sizes: Any,
) -> None:
    """Show the texts of CORPUS that mean most nearly what QUERY means, with their cosine.

    The model's prompts for queries and documents are put before them, if it is known to have any.
    With --vectors the query gets what goes with the prompt that they were made with.
    """
    corpus = Source(_input(source, field, input_format), text=field, kind=input_format)
    how = EmbedOptions(truncate=truncate, prompt=prompt, prompt_name=prompt_name)
    if kept_in is None:
        texts: list[Any] = corpus.texts()
        with _open(model, PoolingType.UNSPECIFIED, **sizes) as llama:
            with _advising(llama, what="the query"):
                asked = llama.embed_query(query, options=how)
            with _advising(llama):
                rows = llama.embed_documents(texts, truncate=truncate)
        scores, indices = semantic_search(asked, rows, top_k=top_k)
    else:
        kept = vectors.Vectors(kept_in)
        texts = corpus.texts(refuse_wrong=False)
        with _open(model, kept.pooling_type, **sizes) as llama, _advising(llama, what="the query"):
            asked = llama.embed(query, options=kept.query_options(llama, how))
        scores, indices = kept.search(asked, texts, top_k=top_k)
    for score, i in zip(scores[0], indices[0], strict=True):
        click.echo(f"{score:.4f}\t{_one_line(texts[i])}")


@main.command()
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
        "CPU backend": model.cpu_backend
    }


@main.command()
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    help="Type of the matrices.  [default: bf16 or f16, whichever is faster on this CPU]",
)
@click.option("--force", is_flag=True, help="Convert again even if it is there.")
def fetch(outtype: str | None, force: bool) -> None:
    """Fetch the default model, so that it is there without a network."""
    there = default_model_path(outtype).is_file() and not force
    path = fetch_default_model(outtype, overwrite=force)
    click.echo(f"{path} ({'already there' if there else 'fetched'})")


@main.command("convert")
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
    help="How vectors are pooled; by default as FOLDER says, or as its family does.",
)
def convert_command(folder: Path, output: Path, outtype: str, pooling: str | None) -> None:
    """Convert a sentence-transformers BERT FOLDER into a GGUF."""
    click.echo(convert(folder, output, outtype=outtype, pooling=pooling))


@main.command("tune")
@click.argument("path", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--length",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Mean tokens of the texts to measure with.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.05),
    default=0.5,
    show_default=True,
    help="How long each measurement takes at least.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table into this file.")
@click.option("--n-gpu-layers", type=int, default=-1, help="Layers on GPUs; -1: all.")
@click.option("--device", metavar="NAME", help="Tune for `Llama(devices=[NAME])`.")
@_CPU_BACKEND
def tune_command(
    path: Path | None,
    length: int,
    seconds: float,
    plot: Path | None,
    n_gpu_layers: int,
    device: str | None,
    cpu_backend: str,
) -> None:
    """Measure contexts, threads, flash attention and packs for MODEL, and remember the best."""
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
    click.echo(f"best, and remembered: {found.best}")
    if plot:
        tuning.plot(found, plot)
        click.echo(f"{plot} drawn")


@main.command("bench")
@click.argument("path", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="GGUF|PYTHON",
    help="Measure in turn with this: another model, or the python of another build's environment.",
)
@click.option(
    "--compare",
    "old",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="JSON",
    help="Compare with what an earlier run wrote.",
)
@click.option(
    "--fail-under",
    type=click.FloatRange(0, min_open=True),
    metavar="RATIO",
    help="Fail if a case is surely slower than that, of what it is compared with.",
)
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this; may be repeated.")
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Runs a case.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.01),
    default=1.0,
    show_default=True,
    help="How long a run takes, about.",
)
@click.option("--contexts", type=click.IntRange(0), default=0, help="As for `Llama`: n_contexts.")
@click.option("--threads", "-t", type=click.IntRange(0), default=0, help="n_threads.")
@click.option("--pack-tokens", type=click.IntRange(0), default=0, help="pack_tokens.")
@_CPU_BACKEND
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them into this file.")
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
    """Measure how fast MODEL is embedded here, and whether that has got slower."""
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
        # Not asked for, it is not said: what it is compared with may be too old to know.
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
        said = (
            f"{name}: {one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
            for name, one in slower.items()
        )
        raise click.ClickException(f"slower than {fail_under}: {'; '.join(said)}")


@main.command()
def versions() -> None:
    """Show what a bug report needs."""
    show_versions()


def _pieces(model: Model, tokens: tuple[int, ...]) -> str:
    return " ".join(model.vocab.token_to_piece(i).decode("utf-8", "replace") for i in tokens)


def _input(
    source: str, field: str, input_format: str | None, keep: tuple[str, ...] = ()
) -> str | Iterable[Any]:
    """Return what `Source` takes for an argument: files, or the rows of a stream."""
    path = Path(source)
    stream = source == "-" or (path.exists() and not path.is_file() and not path.is_dir())
    if source == "-":
        kinds = {input_format or files.LINES}
    else:
        found = [path] if stream else files.find(source, input_format) or []
        kinds = {files.kind_of(one, input_format) for one in found}
    asked = click.get_current_context().get_parameter_source("field")
    if kinds == {files.LINES} and asked is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError(
            f"--field {field}: lines of plain text have no fields; if {source} holds something "
            "else, say what with --input-format"
        )
    if not stream:
        return source
    kind = kinds.pop()
    if kind in files.TABLES:
        raise click.UsageError(f"--input-format {kind}: such tables must be files, not a stream")
    name = "standard input" if source == "-" else source
    opened = sys.stdin.buffer if source == "-" else path.open("rb")
    return files.rows(opened, kind, name, text=field, keep=keep)


def _texts(given: str | Iterable[Any], field: str, input_format: str | None) -> list[str]:
    return cast("list[str]", Source(given, text=field, kind=input_format).texts())


@contextlib.contextmanager
def _advising(llama: Llama, *flags: str, what: str = "text") -> Iterator[None]:
    """Have the error for a text that is too long name the options that help."""
    try:
        yield
    except LlamaError as error:
        too_long = error if isinstance(error, TextTooLongError) else error.__cause__
        if not isinstance(too_long, TextTooLongError):
            raise
        row = error.row if isinstance(error, CorpusError) else None
        which = what if what.startswith("the ") else f"{what} {too_long.index}"
        subject = which if row is None else f"row {row}: the text"
        ways = ["--truncate cuts it", *(f"{flag} averages over windows of it" for flag in flags)]
        if too_long.limit < llama.model.n_ctx_train:
            ways.append(f"--n-ctx N makes room for up to {llama.model.n_ctx_train}")
        raise click.ClickException(
            f"{subject} has {too_long.n_tokens} tokens (special tokens counted), "
            f"{too_long.limit} fit: {', or '.join(ways)}"
        ) from None


def _one_line(text: str) -> str:
    """Return a text as a line of output can show it."""
    return " ".join(text.splitlines())
