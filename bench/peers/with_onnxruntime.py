"""ONNX Runtime: sorted batches, spread over `sessions` sessions of `threads` threads each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
from batches import Batches


class Peer:
    def load(
        self,
        files: dict[str, str],
        *,
        graph: str,
        sessions: int,
        threads: int,
        n_texts: int,
        n_tokens: int,
    ) -> str:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._batches = Batches(files["folder"], n_texts, n_tokens)
        self._sessions = [
            onnxruntime.InferenceSession(
                f"{files['onnx']}/{graph}.onnx", options, providers=["CPUExecutionProvider"]
            )
            for _ in range(sessions)
        ]
        return f"onnxruntime {onnxruntime.__version__}"

    def embed(self, texts: list[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self._batches.n_embd), dtype=np.float32)
        batches = self._batches(texts)

        def work(session: onnxruntime.InferenceSession, own: list[tuple]) -> None:
            for which, inputs in own:
                vectors[which] = session.run(None, inputs)[0]

        if len(self._sessions) == 1:
            work(self._sessions[0], batches)
        else:
            dealt = list(batches)
            n = len(self._sessions)
            with ThreadPoolExecutor(n) as pool:
                done = [pool.submit(work, s, dealt[i::n]) for i, s in enumerate(self._sessions)]
                for future in done:
                    future.result()
        return vectors
