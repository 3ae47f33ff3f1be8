"""xllamacpp: llama.cpp's own server, called in the process and not by HTTP.

Its wheel is compiled for any CPU with AVX2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xllamacpp


class Peer:
    def load(
        self,
        files: dict[str, str],
        *,
        batch: int,
        outtype: str = "bf16",
        n_threads: int | None = None,
        flash_attn: bool = False,
        **how: Any,
    ) -> str:
        params = xllamacpp.CommonParams()
        params.model.path = files[f"gguf {outtype}"]
        params.embedding = True
        params.warmup = False
        params.verbosity = 0
        if n_threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        if flash_attn:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        for name, value in how.items():
            setattr(params, name, value)
        self._batch = batch
        self._server = xllamacpp.Server(params)
        return f"xllamacpp {xllamacpp.__version__}"

    def embed(self, texts: list[str]) -> np.ndarray:
        rows = []
        for i in range(0, len(texts), self._batch):
            answer = self._server.handle_embeddings({"input": texts[i : i + self._batch]})
            if "data" not in answer:
                raise RuntimeError(str(answer))
            rows += [row["embedding"] for row in answer["data"]]
        return np.array(rows, dtype=np.float32)
