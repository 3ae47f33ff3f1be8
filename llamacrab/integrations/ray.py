"""Embed with Ray Data: several processes, on one or more machines.

>>> import ray
>>> from llamacrab.integrations.ray import Embedder
>>> vectors = ray.data.read_parquet("texts/").map_batches(
...     Embedder,
...     fn_constructor_kwargs={"model": "model.gguf"},
...     compute=ray.data.ActorPoolStrategy(size=2),
...     num_cpus=1,
... )  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._support.extras import require
from llamacrab.errors import InputError
from llamacrab.llama import Llama

if TYPE_CHECKING:
    import os

    from llamacrab.options import EmbedOptions


class Embedder:
    """A class for ``Dataset.map_batches``: each actor loads the model once.

    Parameters
    ----------
    model : str or os.PathLike, optional
        A GGUF file that every machine can read; by default all-MiniLM-L6-v2.
    text : str
        The column that holds the texts. A null in it is an error.
    output : str
        The column for the embeddings.
    options : EmbedOptions, optional
        How texts become embeddings.
    **llama_kwargs
        Keywords of `Llama`. `n_cpus` is by default what an actor is given (``num_cpus=`` of
        ``map_batches``).

    Notes
    -----
    The module does not import Ray: Ray calls it. On GPUs pass ``num_gpus=1`` to ``map_batches``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        text: str = "text",
        output: str = "embedding",
        options: EmbedOptions | None = None,
        **llama_kwargs: Any,
    ) -> None:
        if not {"n_cpus", "n_contexts", "n_threads"} & llama_kwargs.keys():
            llama_kwargs["n_cpus"] = _cpus_of_actor()
        self._llama = Llama(model, **llama_kwargs)
        self._text = text
        self._output = output
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add a column of embeddings to a batch.

        Raises
        ------
        InputError
            The batch has no such column, or a row of it is null or not a text; the index in the
            message is that of the row in the batch.
        """
        if self._text not in batch:
            raise InputError(
                f"the batch has no column {self._text!r} (text=); its columns are "
                + ", ".join(map(str, batch))
            )
        embeddings = self._llama.embed_texts(batch[self._text], options=self._options)
        return {**batch, self._output: embeddings}


def _cpus_of_actor() -> int:
    """Return the CPUs of this actor: Ray does not limit the process to them."""
    resources = require("ray", extra="ray").get_runtime_context().get_assigned_resources()
    return max(1, int(resources.get("CPU", 1)))
