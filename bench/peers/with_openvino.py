"""OpenVINO: sorted batches into its queue, `streams` at a time, computed in `precision`."""

from __future__ import annotations

import numpy as np
import openvino
from batches import Batches


class Peer:
    def load(
        self,
        files: dict[str, str],
        *,
        precision: str,
        streams: int,
        n_threads: int,
        n_texts: int,
        n_tokens: int,
    ) -> str:
        self._batches = Batches(files["folder"], n_texts, n_tokens)
        compiled = openvino.Core().compile_model(
            f"{files['onnx']}/plain.onnx",
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": n_threads,
            },
        )
        self._queue = openvino.AsyncInferQueue(compiled, streams)
        self._queue.set_callback(self._keep)
        return f"openvino {openvino.__version__}"

    def _keep(self, request: openvino.InferRequest, which: list[int]) -> None:
        self._vectors[which] = request.get_output_tensor(0).data

    def embed(self, texts: list[str]) -> np.ndarray:
        self._vectors = np.empty((len(texts), self._batches.n_embd), dtype=np.float32)
        for which, inputs in self._batches(texts):
            self._queue.start_async(inputs, which)
        self._queue.wait_all()
        return self._vectors
