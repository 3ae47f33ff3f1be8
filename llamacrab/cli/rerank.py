"""`llamacrab rerank`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from llamacrab._core import PoolingType
from llamacrab.cli.inputs import open_input, read_texts
from llamacrab.cli.messages import length_advice, one_line
from llamacrab.cli.options import model_options, open_llama

if TYPE_CHECKING:
    from llamacrab.options import Truncate
    from llamacrab.requests.reranking import Activation


@click.command()
@click.argument("query")
@click.argument("source", metavar="DOCUMENTS")
@click.option("--top-k", "-k", type=click.IntRange(1), help="Show only the best documents.")
@click.option(
    "--activation",
    type=click.Choice(["none", "sigmoid", "softmax"]),
    default="none",
    show_default=True,
    help="Function to apply to the model's outputs.",
)
@click.option(
    "--answer",
    "answers",
    multiple=True,
    metavar="TEXT",
    help="For a causal model without a rank head: the token that it answers with; given twice, the "
    "opposite answer too. Known models need none.",
)
@click.option("--template", metavar="TEXT", help="Format of a pair, with {query} and {document}.")
@click.option("--instruction", metavar="TEXT", help="The task, for models that read one.")
@model_options
def rerank(
    query: str,
    source: str,
    top_k: int | None,
    activation: Activation,
    answers: tuple[str, ...],
    template: str | None,
    instruction: str | None,
    model: Path | None,
    truncate: Truncate,
    field: str,
    input_format: str | None,
    **llama_kwargs: Any,
) -> None:
    """Sort the texts of DOCUMENTS by how well they answer QUERY; needs a reranker as --model.

    For a model with several classes, show the scores of all classes, one document per line,
    unsorted.
    """
    if model is None:
        raise click.UsageError("rerank needs --model, the GGUF of a reranker")
    documents = read_texts(open_input(source, field, input_format), field, input_format)
    with (
        open_llama(
            model, PoolingType.RANK, answers=answers or None, template=template, **llama_kwargs
        ) as llama,
        length_advice(llama, what="document"),
    ):
        scores = llama.rerank(
            query, documents, activation=activation, instruction=instruction, truncate=truncate
        )
        labels = llama.labels
    if scores.ndim == 1:
        for i in np.argsort(-scores, kind="stable")[:top_k]:
            click.echo(f"{scores[i]:.4f}\t{one_line(documents[i])}")
        return
    if top_k is not None:
        raise click.ClickException(f"{scores.shape[1]} classes give no order: leave out --top-k")
    for row, document in zip(scores, documents, strict=True):
        columns = [f"{label}={score:.4f}" for label, score in zip(labels, row, strict=True)]
        click.echo("\t".join([*columns, one_line(document)]))
