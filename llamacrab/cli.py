"""The command line: `llamacrab embed | rerank | search | info | tune | fetch | convert ...`."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

import llamacrab
from llamacrab import EmbedOptions, Llama, LlamaError, PoolingType, tuning
from llamacrab._convert import OUTTYPES, convert
from llamacrab._core import CPU_BACKENDS, Model, devices
from llamacrab.corpus import embed_corpus, shards
from llamacrab.default_model import default_model_path, fetch_default_model, resolve
from llamacrab.prompts import prompts_of
from llamacrab.similarity import semantic_search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llamacrab.rerank import Activation, Truncate

POOLINGS = {pooling.name.lower(): pooling for pooling in PoolingType if pooling >= 0}


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on standard error."""
    warnings.showwarning = _show_warning
    try:
        # Asked for nothing, it says what it can do.
        arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        return main(arguments, prog_name="llamacrab", standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        return _complain(error.format_message(), 2)
    except (click.ClickException, LlamaError, OSError, ValueError) as error:
        return _complain(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)


def _show_warning(message: Warning | str, *where: object, **how: object) -> None:
    _complain(f"warning: {message}", 0)


def _complain(message: str, code: int) -> int:
    click.echo(f"llamacrab: {' '.join(message.split())}", err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llamacrab.__version__, message="llamacrab %(version)s")
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
            help="Threads; 0: all that this process may use.",
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
            help="Field of a .jsonl line that holds the text.",
        ),
    ):
        merged = option(merged)
    return merged


def _open(model: Path | None, pooling: PoolingType, **sizes: Any) -> Llama:
    return Llama(
        model,
        pooling_type=pooling,
        n_ctx=sizes["n_ctx"],
        n_threads=sizes["threads"],
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
    type=click.Path(path_type=Path),
    help=".npy: a float32 matrix; .jsonl: a text and its vector a line.",
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
    output: Path,
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
    **sizes: Any,
) -> None:
    """Embed every line of INPUT: text, .jsonl, or - for standard input.

    Where --output is a folder, INPUT may also be a table (.parquet, .csv, .arrow) or a glob, and
    the job goes on where it stopped when it is started again.
    """
    if output.suffix not in ("", ".npy", ".jsonl"):
        raise click.BadParameter(
            f"{output} must end in .npy or .jsonl, or be a folder", param_hint="--output"
        )
    if not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
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
    if not output.suffix:
        rows = (row for row in _read_texts("-", field)) if source == "-" else source
        with _open(model, chosen, **sizes) as llama:
            done = embed_corpus(
                rows,
                output,
                llama,
                text=field,
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
    texts = list(_read_texts(source, field))
    with _open(model, chosen, **sizes) as llama:
        vectors = llama.embed_texts(texts, options=options, progress=sys.stderr.isatty())
    _write_vectors(output, texts, np.asarray(vectors))
    click.echo(f"{len(texts)} texts -> {output}: {dtype}, {vectors.shape}", err=True)


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
    **sizes: Any,
) -> None:
    """Sort the lines of DOCUMENTS by how well they answer QUERY; needs a reranker as --model.

    A model with several classes gives its score for each, a line a document, unsorted.
    """
    if model is None:
        raise click.UsageError("rerank needs --model, the GGUF of a reranker")
    documents = list(_read_texts(source, field))
    with _open(model, PoolingType.RANK, **sizes) as llama:
        scores = llama.rerank(query, documents, activation=activation, truncate=truncate)
        labels = llama.labels
    if scores.ndim == 1:
        for i in np.argsort(-scores, kind="stable")[:top_k]:
            click.echo(f"{scores[i]:.4f}\t{documents[i]}")
        return
    if top_k is not None:
        raise click.ClickException(f"{scores.shape[1]} classes give no order: leave out --top-k")
    for row, document in zip(scores, documents, strict=True):
        shown = [f"{label}={score:.4f}" for label, score in zip(labels, row, strict=True)]
        click.echo("\t".join([*shown, document]))


@main.command()
@click.argument("source", metavar="CORPUS")
@click.argument("query")
@click.option(
    "--top-k", "-k", type=click.IntRange(1), default=5, show_default=True, help="How many to show."
)
@click.option(
    "--vectors",
    type=click.Path(path_type=Path, exists=True),
    help="The corpus's vectors, as `embed -o FILE.npy` wrote them.",
)
@_model_options
def search(
    source: str,
    query: str,
    top_k: int,
    vectors: Path | None,
    model: Path | None,
    truncate: Truncate,
    field: str,
    **sizes: Any,
) -> None:
    """Show the lines of CORPUS that mean most nearly what QUERY means, with their cosine.

    The model's prompts for queries and documents are put before them, if it is known to have any.
    """
    corpus = list(_read_texts(source, field))
    with _open(model, PoolingType.UNSPECIFIED, **sizes) as llama:
        asked = llama.embed_query(query, truncate=truncate)
        if vectors is None:
            rows = llama.embed_documents(corpus, truncate=truncate)
        else:
            rows = np.load(vectors, mmap_mode="r")
    if len(rows) != len(corpus) or rows.shape[1:] != asked.shape:
        raise click.ClickException(
            f"{vectors} has shape {rows.shape}, but {source} has {len(corpus)} texts and the model "
            f"{asked.shape[0]} dimensions"
        )
    scores, indices = semantic_search(asked, rows, top_k=top_k)
    for score, i in zip(scores[0], indices[0], strict=True):
        click.echo(f"{score:.4f}\t{corpus[i]}")


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
            "special tokens": f"{_pieces(model, model.vocab.prefix)} text "
            f"{_pieces(model, model.vocab.suffix)}".strip(),
        }
        for name, prompt in prompts_of(model.metadata).items():
            rows[f"prompt {name}"] = repr(prompt)
    for name, value in rows.items():
        click.echo(f"{name:16} {value}")


@main.command()
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default="bf16",
    show_default=True,
    help="Type of the matrices.",
)
@click.option("--force", is_flag=True, help="Convert again even if it is there.")
def fetch(outtype: str, force: bool) -> None:
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
def convert_command(folder: Path, output: Path, outtype: str) -> None:
    """Convert a sentence-transformers BERT FOLDER into a GGUF."""
    click.echo(convert(folder, output, outtype=outtype))


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
    on_gpu = n_gpu_layers != 0 and tuning.has_gpu(device and [device])

    def report(one: tuning.Measurement) -> None:
        layout = one.layout
        click.echo(
            f"{layout.n_contexts:8} {layout.n_threads:7} {layout.flash_attn!s:>10} "
            f"{layout.pack_tokens:11} {one.tokens_per_second:9,.0f}"
        )

    click.echo("contexts threads flash_attn pack_tokens  tokens/s")
    with Model(
        resolve(path), n_gpu_layers=n_gpu_layers, device=device, cpu_backend=cpu_backend
    ) as model:
        found = tuning.tune(model, on_gpu=on_gpu, n_tokens=length, seconds=seconds, report=report)
        tuning.remember(model, on_gpu, found.best)
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
    llamacrab.show_versions()


def _pieces(model: Model, tokens: tuple[int, ...]) -> str:
    return " ".join(model.vocab.token_to_piece(i).decode("utf-8", "replace") for i in tokens)


def _read_texts(source: str, field: str) -> Iterator[str]:
    """Yield the texts of a file, of a .jsonl file, or of standard input."""
    with click.open_file(source, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                yield _field(json.loads(text), field) if source.endswith(".jsonl") else text
            except UnicodeDecodeError as error:
                raise click.ClickException(f"{source}, line {number}: not UTF-8: {error}") from None
            except (ValueError, KeyError, TypeError) as error:
                raise click.ClickException(
                    f"{source}, line {number}: no JSON object with a text {field!r}: {error}"
                ) from None


def _field(record: Any, field: str) -> str:
    text = record[field]
    if not isinstance(text, str):
        raise TypeError(f"it is {type(text).__name__}, not a string")
    # JSON can spell half of a surrogate pair, which no output could hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _write_vectors(output: Path, texts: list[str], vectors: np.ndarray) -> None:
    """Write the vectors beside `output` and rename, so that it is never half there."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        if output.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, vectors)
        else:
            with partial.open("w", encoding="utf-8") as file:
                for text, vector in zip(texts, vectors.tolist(), strict=True):
                    row = {"text": text, "embedding": vector}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
