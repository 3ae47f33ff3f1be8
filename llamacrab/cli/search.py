"""`llamacrab search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamacrab._core import PoolingType
from llamacrab.cli.inputs import open_input
from llamacrab.cli.messages import length_advice, one_line
from llamacrab.cli.options import model_options, open_llama
from llamacrab.corpus import vectors
from llamacrab.corpus.sources import Source
from llamacrab.options import EmbedOptions
from llamacrab.similarity import semantic_search

if TYPE_CHECKING:
    from llamacrab.options import Truncate


@click.command()
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
@model_options
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
    **llama_kwargs: Any,
) -> None:
    """Show the texts of CORPUS that mean most nearly what QUERY means, with their cosine.

    The model's prompts for queries and documents are put before them, if it is known to have any.
    With --vectors the query gets what goes with the prompt that they were made with.
    """
    corpus = Source(open_input(source, field, input_format), text=field, kind=input_format)
    options = EmbedOptions(truncate=truncate, prompt=prompt, prompt_name=prompt_name)
    if kept_in is None:
        texts: list[Any] = corpus.texts()
        with open_llama(model, PoolingType.UNSPECIFIED, **llama_kwargs) as llama:
            with length_advice(llama, what="the query"):
                asked = llama.embed_query(query, options=options)
            with length_advice(llama):
                rows = llama.embed_documents(texts, truncate=truncate)
        scores, indices = semantic_search(asked, rows, top_k=top_k)
    else:
        kept = vectors.Vectors(kept_in)
        texts = corpus.texts(refuse_wrong=False)
        with (
            open_llama(model, kept.pooling_type, **llama_kwargs) as llama,
            length_advice(llama, what="the query"),
        ):
            asked = llama.embed(query, options=kept.query_options(llama, options))
        scores, indices = kept.search(asked, texts, top_k=top_k)
    for score, i in zip(scores[0], indices[0], strict=True):
        click.echo(f"{score:.4f}\t{one_line(texts[i])}")
