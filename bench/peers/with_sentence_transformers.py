"""sentence-transformers: `encode`, which sorts by length. `dtype` is torch's name of a type.

The best size of a batch depends on how long the texts are, so it comes with them.
"""

from __future__ import annotations

import numpy as np
import sentence_transformers
import torch


class Peer:
    def load(
        self, files: dict[str, str], *, dtype: str, n_threads: int, device: str = "cpu"
    ) -> str:
        torch.set_num_threads(n_threads)
        self._model = sentence_transformers.SentenceTransformer(
            files["folder"], device=device, model_kwargs={"dtype": getattr(torch, dtype)}
        )
        self._model.max_seq_length = 512  # as much as the model can, like all others
        return f"sentence-transformers {sentence_transformers.__version__}"

    def embed(self, texts: list[str], *, batch: int) -> np.ndarray:
        found = self._model.encode(
            texts,
            batch_size=batch,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        return found.float().cpu().numpy()
