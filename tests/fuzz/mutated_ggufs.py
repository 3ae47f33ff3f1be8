"""One case: a GGUF of the tests with something broken, loaded and made to embed one text."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from helpers import EMBEDDERS, RERANKERS, gguf_path

from llamacrab import Llama, LlamaError, PoolingType

EXPECTED = (LlamaError,)
NAMES = (*EMBEDDERS, *RERANKERS, "tiny-t5")
STRING, ARRAY = 8, 9
FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
KEYS = sorted(
    key
    for group in vars(gguf.Keys).values()
    if isinstance(group, type)
    for key in vars(group).values()
    if isinstance(key, str) and "." in key and "split" not in key
)
ARCHITECTURES = sorted(gguf.MODEL_ARCH_NAMES.values())


@dataclass
class Pair:
    """A key and its value: bytes, but for an array of strings a list of them."""

    key: bytes
    kind: int
    value: bytes | list[bytes]
    element: int = 0  # kind of an array's elements

    def parts(self) -> list[bytes]:
        """Return the elements of an array."""
        if isinstance(self.value, list):
            return self.value[:]
        size = struct.calcsize(FORMATS[self.element])
        return [self.value[i : i + size] for i in range(0, len(self.value), size)]

    def set_parts(self, parts: list[bytes]) -> None:
        self.value = parts if self.element == STRING else b"".join(parts)


@dataclass
class Tensor:
    name: bytes
    shape: list[int]
    kind: int
    offset: int


class File:
    """A GGUF taken apart."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 24
        n_tensors, n_pairs = struct.unpack_from("<qq", data, 8)
        self.pairs = [self._pair() for _ in range(n_pairs)]
        self.tensors = [
            Tensor(
                self._string(),
                [self._int(8) for _ in range(self._int(4))],
                self._int(4),
                self._int(8),
            )
            for _ in range(n_tensors)
        ]
        self.weights = data[-(-self._at // 32) * 32 :]

    def _bytes(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def _int(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "little")

    def _string(self) -> bytes:
        return self._bytes(self._int(8))

    def _scalar(self, kind: int) -> bytes:
        return self._string() if kind == STRING else self._bytes(struct.calcsize(FORMATS[kind]))

    def _pair(self) -> Pair:
        key, kind = self._string(), self._int(4)
        if kind != ARRAY:
            return Pair(key, kind, self._scalar(kind))
        element, n = self._int(4), self._int(8)
        if element == STRING:
            return Pair(key, kind, [self._string() for _ in range(n)], element)
        return Pair(key, kind, self._bytes(n * struct.calcsize(FORMATS[element])), element)

    def copy(self) -> File:
        """Return a copy that shares what no mutation changes in place."""
        other = object.__new__(File)
        other.pairs = [replace(p) for p in self.pairs]
        other.tensors = [replace(t, shape=t.shape[:]) for t in self.tensors]
        other.weights = self.weights
        return other

    def joined(self) -> tuple[bytearray, int]:
        """Return the bytes of a file, and how many of them are its header."""

        def string(value: bytes) -> bytes:
            return struct.pack("<Q", len(value)) + value

        header = bytearray(b"GGUF" + struct.pack("<Iqq", 3, len(self.tensors), len(self.pairs)))
        for pair in self.pairs:
            header += string(pair.key) + struct.pack("<I", pair.kind)
            if pair.kind == ARRAY:
                size = struct.calcsize(FORMATS.get(pair.element, "B"))
                header += struct.pack("<IQ", pair.element, len(pair.value) // size)
            if isinstance(pair.value, list):
                header += b"".join(map(string, pair.value))
            else:
                header += string(pair.value) if pair.kind == STRING else pair.value
        for tensor in self.tensors:
            header += string(tensor.name) + struct.pack("<I", len(tensor.shape))
            header += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            header += struct.pack("<IQ", tensor.kind, tensor.offset)
        size = len(header)
        return header + bytes(-size % 32) + self.weights, size


NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 255, 256, 511, 65_535, 65_536, 1 << 20, 1 << 30,
    -1, -2,
)  # fmt: skip
FLOATS = (0.0, -0.0, -1.0, 1.0, 1e-45, 1e38, -1e38, 1e4, float("nan"), float("inf"), 0.3)
STRINGS = (
    b"", b"\0", b"\xff" * 4, b" " * 70, b"%s%n", b"{document}", b"{document}{document}", b"<s>",
    b"\xe2\x96\x81", b"a" * 300, b"bert", b"llama", b"gpt2", b"t5", b"no_vocab", b"rwkv", b"plamo2",
    b"linear", b"yarn", b"deepseek-llm", b"qwen2", b"default", b"jina-v2-de", b"gpt-4o", b"tekken",
)  # fmt: skip


def number(rng: random.Random, kind: int, old: bytes = b"") -> bytes:
    """Return a number that is likely to hurt."""
    code = "<" + FORMATS[kind]
    if kind in (6, 12):
        return struct.pack(code, rng.choice(FLOATS))
    size = struct.calcsize(code)
    top, now = 1 << 8 * size, int.from_bytes(old, "little")
    near = (now + 1, now - 1, 2 * now, now // 2, top // 2, top // 2 - 1)
    value = rng.choice((*near, rng.randrange(1000), rng.randrange(top), *NUMBERS))
    return (value % top).to_bytes(size, "little")


def text(rng: random.Random, old: bytes) -> bytes:
    near = (old + b"x", old[:-1], old * 2, rng.randbytes(rng.randrange(20)))
    return rng.choice((*near, *STRINGS))


# ------------------------------------------------------------------- in the file taken apart


def set_scalar(file: File, rng: random.Random) -> None:
    pair = rng.choice([p for p in file.pairs if p.kind != ARRAY])
    if pair.kind == STRING:
        pair.value = text(rng, pair.value)
    else:
        pair.value = number(rng, pair.kind, pair.value)


def fill(pair: Pair, rng: random.Random) -> None:
    """Give a pair a value of its kind."""
    if pair.kind == ARRAY:
        pair.element = rng.choice([*FORMATS, STRING])
        n = rng.choice([0, 1, 2, 3, 4, 512, 600])
        is_text = pair.element == STRING
        pair.set_parts([text(rng, b"") if is_text else number(rng, pair.element) for _ in range(n)])
    else:
        pair.value = text(rng, b"") if pair.kind == STRING else number(rng, pair.kind)


def change_kind(file: File, rng: random.Random) -> None:
    pair = rng.choice(file.pairs)
    pair.element, pair.kind = 0, rng.choice([*FORMATS, STRING, ARRAY])
    fill(pair, rng)


def set_elements(file: File, rng: random.Random) -> None:
    pair = rng.choice([p for p in file.pairs if p.kind == ARRAY])
    parts = pair.parts() or [b""]
    for _ in range(rng.choice([1, 1, 5, min(len(parts), 1000)])):
        at = rng.randrange(len(parts))
        new = (
            text(rng, parts[at]) if pair.element == STRING else number(rng, pair.element, parts[at])
        )
        parts[at] = rng.choice(parts) if rng.random() < 0.3 else new
    pair.set_parts(parts)


def resize_array(file: File, rng: random.Random) -> None:
    pair = rng.choice([p for p in file.pairs if p.kind == ARRAY])
    parts = pair.parts()
    n = len(parts)
    size = rng.choice([0, 1, 5, n // 2, max(n - 1, 0), n + 1, 2 * n])
    if pair.element == STRING:
        more = [b"more%d" % i for i in range(size)]
    else:
        more = (parts or [number(rng, pair.element)]) * 2
    pair.set_parts((parts + more)[:size])


def drop_pair(file: File, rng: random.Random) -> None:
    del file.pairs[rng.randrange(len(file.pairs))]


def architecture(file: File) -> bytes:
    said = [p.value for p in file.pairs if p.key == b"general.architecture" and p.kind == STRING]
    return said[0] if said else b"bert"


def add_pair(file: File, rng: random.Random) -> None:
    arch = architecture(file).decode("latin-1")
    key = rng.choice(KEYS).replace("{arch}", arch).encode()
    pair = Pair(key, rng.choice([4, 4, 4, 5, 6, 6, 7, 10, STRING, ARRAY]), b"")
    fill(pair, rng)
    if rng.random() < 0.9:
        file.pairs = [p for p in file.pairs if p.key != key]
    file.pairs.insert(rng.randrange(len(file.pairs) + 1), pair)


def change_architecture(file: File, rng: random.Random) -> None:
    old, new = architecture(file), rng.choice(ARCHITECTURES).encode()
    for pair in file.pairs:
        if pair.key == b"general.architecture" and pair.kind == STRING:
            pair.value = new
        elif pair.key.startswith(old + b"."):
            pair.key = new + pair.key[len(old) :]


def drop_tensor(file: File, rng: random.Random) -> None:
    if file.tensors:
        file.tensors.pop()  # any other would leave a gap, which is refused at once
        if rng.random() < 0.5 and file.tensors:
            rng.choice(file.tensors).name = rng.choice(file.tensors).name


def change_tensor(file: File, rng: random.Random) -> None:
    tensor = rng.choice(file.tensors)
    action = rng.randrange(5)
    if action == 0:
        tensor.shape.reverse()
    elif action == 1:
        at = rng.randrange(len(tensor.shape))
        tensor.shape[at] = int.from_bytes(
            number(rng, 10, tensor.shape[at].to_bytes(8, "little")), "little"
        )
    elif action == 2:
        tensor.kind = rng.randrange(42)
    elif action == 3:
        other = rng.choice(file.tensors)
        tensor.name, other.name = other.name, tensor.name
    else:
        tensor.offset = int.from_bytes(
            number(rng, 10, tensor.offset.to_bytes(8, "little")), "little"
        )


def poison_weights(file: File, rng: random.Random) -> None:
    weights = bytearray(file.weights)
    for _ in range(rng.choice([1, 4, 64])):
        at = rng.randrange(len(weights) - 4) & ~3
        weights[at : at + 4] = rng.choice(
            [b"\0\0\xc0\x7f", b"\xff" * 4, b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", rng.randbytes(4)]
        )
    file.weights = bytes(weights)


# ------------------------------------------------------------------- in its bytes


def flip_bits(data: bytearray, header: int, rng: random.Random) -> None:
    end = rng.choice([200, 2000, header, len(data)])
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, header: int, rng: random.Random) -> None:
    size = rng.choice([1, 2, 4, 8])
    at = rng.randrange(rng.choice([24, 200, 2000, header]))
    data[at : at + size] = number(rng, {1: 0, 2: 2, 4: 4, 8: 10}[size], bytes(data[at : at + size]))


def truncate(data: bytearray, header: int, rng: random.Random) -> None:
    del data[rng.randrange(header if rng.random() < 0.5 else len(data)) :]


def splice(data: bytearray, header: int, rng: random.Random) -> None:
    other = BYTES[rng.choice(NAMES)] if rng.random() < 0.5 else bytes(data)
    size = rng.choice([1, 4, 8, 12, 64, 1000, 20_000])
    start, into = rng.randrange(len(other)), rng.randrange(header)
    replaced = rng.choice([0, size])
    data[into : into + replaced] = other[start : start + size] if rng.random() < 0.7 else b""


IN_FILE = (
    set_scalar, set_scalar, set_scalar, change_kind, set_elements, set_elements, resize_array,
    drop_pair, add_pair, add_pair, change_architecture, drop_tensor, change_tensor, change_tensor,
    poison_weights,
)  # fmt: skip
IN_BYTES = (flip_bits, set_bytes, truncate, splice)
BYTES = {name: gguf_path(name).read_bytes() for name in NAMES}
FILES = {name: File(data) for name, data in BYTES.items()}


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """Return which file it was, and its bytes now."""
    name = rng.choice(NAMES)
    if rng.random() < 0.75:
        file = FILES[name].copy()
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            with contextlib.suppress(IndexError):  # nothing is left that it could change
                rng.choice(IN_FILE)(file, rng)
        data, header = file.joined()
        if rng.random() < 0.9:
            return name, bytes(data)
    else:
        data, header = FILES[name].joined()
    rng.choice(IN_BYTES)(data, header, rng)
    return name, bytes(data)


@contextlib.contextmanager
def target() -> Iterator[Path]:
    """Give a file to write the case into, in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "case.gguf"


def run(path: Path, rng: random.Random) -> None:
    name, data = mutated(rng)
    path.write_bytes(data)
    text = rng.choice(
        ["The crab walks sideways.", "", "\u6c34 crab \U0001f980", "[SEP] <s> a" * 40]
    )
    with Llama(
        path,
        n_contexts=1,
        n_threads=1,
        n_ctx=rng.choice([0, 0, 64]),
        pooling_type=PoolingType(rng.choice([-1, -1, -1, -1, 0, 1, 2, 3, 4])),
        use_mmap=rng.random() < 0.7,
    ) as llama:
        vocab = llama.model.vocab
        vocab.detokenize(vocab.tokenize(text, parse_special=rng.random() < 0.3))
        if llama.pooling_type == PoolingType.RANK:
            rows = llama.rerank("What walks?", [text], truncate=True)
        else:
            rows = llama.embed(text, truncate=True, parse_special=rng.random() < 0.3)
    if not np.isfinite(rows).all():
        raise AssertionError(f"{name}: rows that are not finite were returned")
