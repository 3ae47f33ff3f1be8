"""Embed with Ray Data: many processes, on one machine or on many.

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
        The column that holds the texts; a null in it is an error, as everywhere.
    output : str
        The column for the vectors.
    options : EmbedOptions, optional
        How texts become vectors.
    **how
        What `Llama` is made with. By default `n_cpus` is what an actor is given (``num_cpus=`` of
        ``map_batches``).

    Notes
    -----
    The module imports nothing of Ray: Ray calls it. On GPUs pass ``num_gpus=1`` to ``map_batches``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        text: str = "text",
        output: str = "embedding",
        options: EmbedOptions | None = None,
        **how: Any,
    ) -> None:
        if not {"n_cpus", "n_contexts", "n_threads"} & how.keys():
            how["n_cpus"] = _cpus_of_actor()
        self._llama = Llama(model, **how)
        self._text = text
        self._output = output
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add a column of vectors to a batch.

        Raises
        ------
        InputError
            The batch has no such column, or a row of it is null or no text; the index in the
            message counts the rows of the batch.
        """
        if self._text not in batch:
            raise InputError(
                f"the batch has no column {self._text!r} (text=); its columns are "
                + ", ".join(map(str, batch))
            )
        vectors = self._llama.embed_texts(batch[self._text], options=self._options)
        return {**batch, self._output: vectors}


def _cpus_of_actor() -> int:
    """Return the CPUs that Ray has given to this actor: the process itself could use all."""
    resources = require("ray", extra="ray").get_runtime_context().get_assigned_resources()
    return max(1, int(resources.get("CPU", 1)))
