"""What the tests share: golden data, other processes, and GGUF files with something changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy

DATA = Path(__file__).resolve().parent / "data"
TEXTS = [
    json.loads(line)["text"]
    for line in (DATA / "texts.jsonl").read_text(encoding="utf-8").splitlines()
]
PAIRS = json.loads((DATA / "pairs.json").read_text(encoding="utf-8"))
# One embedder for each kind of vocabulary: for what is about texts.
EMBEDDERS = ("tiny-bert", "tiny-xlmr", "tiny-qwen3", "tiny-llama")
# All embedders, and the pooling that each one's file asks for: for what is about vectors.
FAMILIES = {
    "tiny-bert": "MEAN",
    "tiny-xlmr": "CLS",
    "tiny-qwen3": "LAST",
    "tiny-llama": "MEAN",  # which says nothing
    "tiny-roberta": "MEAN",
    "tiny-nomic": "MEAN",
    "tiny-nomic-moe": "MEAN",
    "tiny-jina-v2": "MEAN",
    "tiny-jina-v3": "MEAN",
    "tiny-modernbert": "CLS",
    "tiny-eurobert": "MEAN",
    "tiny-neobert": "CLS",
    "tiny-gemma-embedding": "MEAN",
    "tiny-gemma2": "LAST",
    "tiny-llama-embed": "MEAN",
    "tiny-qwen2": "LAST",
}
CAUSAL = ("tiny-qwen3", "tiny-llama", "tiny-gemma2")
RERANKERS = (
    "tiny-bert-rank",
    "tiny-xlmr-rank",
    "tiny-qwen3-rank",
    "tiny-modernbert-rank",
    "tiny-modernbert-rank-cls",
)


def gguf_path(name: str) -> Path:
    """Return the path of a tiny model."""
    return DATA / f"{name}.gguf"


def golden(name: str) -> dict[str, np.ndarray]:
    """Return what the oracle gave for a model: arrays by name."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def ragged(arrays: dict[str, np.ndarray], values: str = "ids", places: str = "offsets"):
    """Return a list of arrays, one for each text."""
    return np.split(arrays[values], arrays[places][1:-1])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `a` with the same row of `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def python(
    code: str, *args: object, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own and return what came of it, also if it died."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        check=False,
        # gdb would write a backtrace of the whole interpreter.
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUTF8": "1", **env},
    )


def check_python(code: str, *args: object, timeout: float = 120, **env: str) -> str:
    """Run `code` in a process of its own that must end well, and return what it printed."""
    done = python(code, *args, timeout=timeout, **env)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def one_cpu() -> Iterator[None]:
    """Start processes on one CPU, where the system can.

    Threads that share a pack wait by spinning: on a busy machine `tune` would take minutes.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})  # of this thread, and of what it starts
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Reader(gguf.GGUFReader):
    """gguf's reader, which takes an array of numbers at once: a charsmap has 240,000."""

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        if raw_type == gguf.GGUFValueType.ARRAY:
            element, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            kind = gguf.GGUFValueType(int(element[0]))
            if kind in self.gguf_scalar_to_np:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], int(length[0]))
                types = [gguf.GGUFValueType.ARRAY, kind]
                return 12 + values.nbytes, [element, length, values], [2], types
        return super()._get_field_parts(orig_offs, raw_type)


def rewrite_gguf(
    source: Path,
    destination: Path,
    fields: dict[str, tuple[object, gguf.GGUFValueType]] | None = None,
    drop: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    *,
    architecture: str | None = None,
    quantized: dict[str, gguf.GGMLQuantizationType] | None = None,
    tensors_per_shard: int = 0,
) -> Path:
    """Copy a GGUF with fields set, and tensors too, and some of both left out.

    With another `architecture`, keys that start with the old one are renamed. Tensors that
    `quantized` names get that type. Returns the first file if there are shards.
    """
    fields, tensors = fields or {}, dict(tensors or {})
    reader = Reader(source)
    own = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(destination, architecture or own, split_max_tensors=tensors_per_shard)

    def add(name: str, values: np.ndarray) -> None:
        kind = (quantized or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")) or name in {*drop, *fields}:
            continue
        element = field.types[-1] if len(field.types) > 1 else None
        if architecture is not None and name.startswith(f"{own}."):
            name = architecture + name.removeprefix(own)
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    for name, (value, kind) in fields.items():
        element = gguf.GGUFValueType.STRING if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=element)
    for tensor in reader.tensors:
        if tensor.name in tensors:
            add(tensor.name, tensors.pop(tensor.name))
        elif tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in tensors.items():
        add(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tensors_per_shard:
        return min(destination.parent.glob(f"{destination.stem}-00001-of-*.gguf"))
    return destination


def edit(folder: Path, name: str, **changes: object) -> None:
    """Change values of a JSON file of a model's folder."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def edit_tensors(folder: Path, change) -> None:
    """Have `change` alter the weights of a model's folder, a dict of arrays."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load_file(path).items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
