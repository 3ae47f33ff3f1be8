"""The plain C++ loop of bench/loop.cpp, over the llama.cpp that llamacrab was built with.

Its settings are searched as bench/loop.py does, on a sample of the texts when these are first seen,
and kept in `memory`: a search takes longer than a measurement.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import loop

import llamacrab

SAMPLE = 4  # every fourth text is searched with


class Peer:
    def load(self, files: dict[str, str], *, outtype: str = "bf16") -> str:
        self._folder = tempfile.TemporaryDirectory()
        self._memory = Path(files["memory"])
        self._model = Path(files[f"gguf {outtype}"])
        self._program = loop.build(Path(self._folder.name))
        self._texts: list[str] | None = None
        self._loop = None
        return f"llama.cpp of llamacrab {llamacrab.__version__}"

    def _write(self, name: str, texts: list[str]) -> Path:
        path = Path(self._folder.name, name)
        lines = (text.replace("\n", " ") + "\n" for text in texts)
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def _settings(self, texts: list[str]) -> list[int]:
        about = [self._model, texts, loop.build_info(), loop.tuning.usable_cpus()]
        key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]
        known = json.loads(self._memory.read_text()) if self._memory.is_file() else {}
        if key not in known:
            sample = self._write("sample", texts[::SAMPLE])
            known[key] = loop.sweep(self._program, self._model, sample, quick=False)
            self._memory.write_text(json.dumps(known))
        return known[key]

    def settings(self) -> str:
        contexts, threads, tokens, flash = self._found
        return (
            f"{contexts} contexts x {threads} threads, packs of {tokens} tokens, "
            f"flash attention {'on' if flash else 'off'}"
        )

    def embed(self, texts: list[str]) -> np.ndarray:
        if texts is not self._texts:  # the first call, which is not timed
            if self._loop is not None:
                self._loop.close()
            self._found = self._settings(texts)
            path = self._write("texts", texts)
            self._loop = loop.Loop(self._program, self._model, path, *self._found)
            self._texts = texts
        path = Path(self._folder.name, "vectors")
        self._loop(path)
        return np.fromfile(path, dtype=np.float32).reshape(len(texts), -1)
