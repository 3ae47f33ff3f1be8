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
    "--top-k", "-k", type=click.IntRange(1), default=5, show_default=True, help="Texts to show."
)
@click.option(
    "--vectors",
    "vectors_path",
    type=click.Path(path_type=Path, exists=True),
    help="The corpus's embeddings, as `embed` wrote them: .npy, .jsonl, or a folder.",
)
@click.option("--prompt", help="Put this before the query, instead of the model's own prompt.")
@click.option("--prompt-name", metavar="NAME", help="Put this prompt of the model before it.")
@model_options
def search(
    source: str,
    query: str,
    top_k: int,
    vectors_path: Path | None,
    prompt: str | None,
    prompt_name: str | None,
    model: Path | None,
    truncate: Truncate,
    field: str,
    input_format: str | None,
    **llama_kwargs: Any,
) -> None:
    """Show the texts of CORPUS whose meaning is nearest to QUERY, with their cosine.

    The model's prompts for queries and documents are used, if they are known. With --vectors, the
    query gets the prompt that matches the one of the embeddings.
    """
    corpus = Source(open_input(source, field, input_format), text=field, kind=input_format)
    options = EmbedOptions(truncate=truncate, prompt=prompt, prompt_name=prompt_name)
    if vectors_path is None:
        texts: list[Any] = corpus.texts()
        with open_llama(model, PoolingType.UNSPECIFIED, **llama_kwargs) as llama:
            with length_advice(llama, what="the query"):
                query_embedding = llama.embed_query(query, options=options)
            with length_advice(llama):
                rows = llama.embed_documents(texts, truncate=truncate)
        scores, indices = semantic_search(query_embedding, rows, top_k=top_k)
    else:
        stored = vectors.Vectors(vectors_path)
        texts = corpus.texts(refuse_wrong=False)
        with (
            open_llama(model, stored.pooling_type, **llama_kwargs) as llama,
            length_advice(llama, what="the query"),
        ):
            query_embedding = llama.embed(query, options=stored.query_options(llama, options))
        scores, indices = stored.search(query_embedding, texts, top_k=top_k)
    for score, i in zip(scores[0], indices[0], strict=True):
        click.echo(f"{score:.4f}\t{one_line(texts[i])}")
