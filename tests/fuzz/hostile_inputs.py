"""One case: a call of llamacrab with an argument that nobody should pass, on one of the models."""

from __future__ import annotations

import array
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from helpers import EMBEDDERS, RERANKERS, TEXTS, gguf_path

from llamacrab import Batch, Context, EmbedOptions, Llama, LlamaError, Model, PoolingType
from llamacrab._core import Tokenization


class Hostile(Exception):
    """What the objects below raise when they are looked at."""


# What arguments raise when they are read, and what Python raises for them: OverflowError for an int
# that no C type holds, MemoryError of list() for what says that it is long, AttributeError for
# options that are none.
OF_PYTHON = (TypeError, ValueError, AttributeError, OverflowError, MemoryError, BufferError)
EXPECTED = (LlamaError, *OF_PYTHON, np.ma.MaskError, Hostile)
PIECES = (
    "a", " ", "\n", "\0", "\t ", "7", "!", "\u6c34", "\uac00", "e\u0301", "\u0301", "\u200d",
    "\U0001f980", "\U0001f469\u200d\U0001f52c", "\ud800", "\udfff", "\ufdfa", "\u0937\u093f",
    "\u202e", "\ufeff", "\U0010ffff", "\uffff", "[SEP]", "[CLS]", "</s>", "<s>", "<|im_start|>",
    "<0x00>", "<unused0>", "\u2581", "\u0120", "##", "{document}", "{query}", "%s%n", "crab ",
)  # fmt: skip


class Odd:
    """An object that lies about being a sequence."""

    def __init__(self, size: int, fails: str) -> None:
        self.size, self.fails = size, fails

    def __len__(self) -> int:
        if self.fails == "len":
            raise Hostile("len")
        return self.size

    def __getitem__(self, at: int) -> int:
        if self.fails == "item" and at > 2:
            raise Hostile("item")
        if at >= 5:
            raise IndexError
        return at

    def __bool__(self) -> bool:
        if self.fails == "bool":
            raise Hostile("bool")
        return True

    def __index__(self) -> int:
        if self.fails == "index":
            raise Hostile("index")
        return self.size

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        if self.fails == "array":
            raise Hostile("array")
        return np.array([1.5] if self.fails == "floats" else [self.size % 1000])


class OddText(str):
    """A str of a class of its own."""

    __slots__ = ()

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        raise Hostile("encode")


def text_of(rng: random.Random) -> str:
    kind = rng.randrange(9)
    size = rng.choice([0, 1, 2, 5, 20, 60, 300])
    if kind == 0:
        return rng.randbytes(size).decode("utf-8", "surrogateescape")
    if kind == 1:
        return rng.randbytes(size).decode("latin-1")
    if kind == 2:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(size))
    if kind == 3:
        return "".join(map(chr, rng.choices(range(0x3000), k=size)))
    if kind == 4:
        return "".join(rng.choices(PIECES, k=size))
    if kind == 5:
        long = 200_000 if rng.random() < 0.005 else 3000
        return rng.choice(PIECES) * rng.randrange(long)
    if kind == 6:
        return rng.randbytes(size).decode("utf-16-le", "surrogatepass") if size % 2 == 0 else "x"
    text = rng.choice(TEXTS)
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(PIECES) * rng.randrange(4) + text[rng.randrange(len(text) + 1) :]


NUMBERS = (
    0, 1, 2, 3, 7, 100, 604, 605, 606, -1, -2, 255, 256, 257, 2**15, 2**31 - 1, 2**31, -(2**31),
    2**32, 2**63, 2**64, -(2**63), 10**30, True, False, 1.0, 2.5, float("nan"), float("inf"), "3",
    None, np.int64(5), np.uint8(3),
)  # fmt: skip


def number_of(rng: random.Random) -> Any:
    return rng.choice(NUMBERS) if rng.random() < 0.9 else rng.randrange(-5, 1000)


def ids_of(rng: random.Random) -> Any:
    n = rng.choice([0, 1, 2, 5, 40, 129, 300])
    good = [rng.randrange(600) for _ in range(n)]
    odd = [number_of(rng) for _ in range(n)]
    mixed = [number_of(rng) if rng.random() < 0.05 else i for i in good]
    kind = rng.randrange(14)
    if kind < 4:
        return (good, mixed, odd, [good, odd])[kind]
    if kind == 4:
        dtype = rng.choice(
            ["i1", "u1", "i2", "u2", ">i4", "i4", "u4", "i8", ">u8", "u8", "f4", "f8"]
        )
        with np.errstate(all="ignore"):
            return np.array(good).astype(dtype)
    if kind == 5:
        return np.array(good, dtype=rng.choice([bool, object, "U3", "S2", "c8", "M8[s]", "m8[s]"]))
    if kind == 6:
        values = np.array(good, dtype=np.int32)
        return rng.choice(
            [values[::2], values[::-1], values[:, None], values[None], values.reshape(-1, 1, 1)]
        )
    if kind == 7:
        return rng.choice([tuple, set, frozenset, iter, bytes, bytearray, list])(
            [i % 256 for i in good]
        )
    if kind == 8:
        return rng.choice([memoryview(bytes(5)), array.array("i", good), array.array("d", [1.0])])
    if kind == 9:
        return rng.choice([range(n), range(-3, 3), range(2**40, 2**40 + 3), dict.fromkeys(good)])
    if kind == 10:
        return np.ma.masked_array(good, mask=[i % 2 for i in good])
    if kind == 11:
        fails = rng.choice(["", "len", "item", "bool", "index", "array", "floats"])
        return Odd(rng.choice([0, 1, 5, -1, 10**6, 2**62]), fails)
    if kind == 12:
        return np.int32(3) if rng.random() < 0.5 else np.array(3)
    return rng.choice([None, object(), Ellipsis, NotImplemented, int, 3.5, 7, b"x", lambda: 1, {}])


def any_of(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.5:
        return text_of(rng)
    if kind < 0.55:
        return OddText(text_of(rng))
    return ids_of(rng) if kind < 0.9 else number_of(rng)


def flag_of(rng: random.Random) -> Any:
    if rng.random() < 0.9:
        return rng.random() < 0.5
    return rng.choice([None, 2, "yes", "", [], np.bool_(True), np.array([1, 2]), Odd(0, "bool")])


def options_of(rng: random.Random) -> dict[str, Any]:
    names = [
        n for n in ("normalize", "start_token", "truncate", "parse_special") if rng.random() < 0.3
    ]
    options = {name: flag_of(rng) for name in names}
    # Most texts are to reach llama.cpp: cut what is long.
    options.setdefault("truncate", rng.random() < 0.9)
    if rng.random() < 0.02:
        options[rng.choice(["nonsense", "n_ctx", "dtype"])] = number_of(rng)
    if rng.random() < 0.02:
        options["options"] = rng.choice([EmbedOptions(truncate=True), {}, 3, None, EmbedOptions])
    return options


def timeout_of(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.95:
        return {}
    return {
        "timeout": rng.choice(
            [None, 60, 1e9, 1e300, float("inf"), -1, float("nan"), "x", True, 2**70]
        )
    }


class Target:
    """The models, each with a context of its own for the calls below `Llama`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        sizes: dict[str, Any] = {"n_contexts": 1, "n_threads": 1}
        self.embedders = [stack.enter_context(Llama(gguf_path(n), **sizes)) for n in EMBEDDERS]
        self.rerankers = [stack.enter_context(Llama(gguf_path(n), **sizes)) for n in RERANKERS]
        self.embedders += [
            stack.enter_context(
                Llama(gguf_path("tiny-bert"), pooling_type=PoolingType.NONE, **sizes)
            )
        ]
        self.contexts = []
        for llama in (*self.embedders, *self.rerankers):
            for pooling in (PoolingType.NONE, llama.pooling_type):
                context = Context(
                    llama.model, n_ctx=96, n_seq_max=3, n_threads=1, pooling_type=pooling
                )
                self.contexts.append((stack.enter_context(context), Batch(64)))


@contextlib.contextmanager
def target() -> Iterator[Target]:
    with contextlib.ExitStack() as stack:
        yield Target(stack)


def check(rows: Any) -> None:
    for row in rows if isinstance(rows, list) else [rows]:
        if not np.isfinite(row).all():
            raise AssertionError("rows that are not finite were returned")


def embed(on: Target, rng: random.Random) -> None:
    check(rng.choice(on.embedders).embed(any_of(rng), **options_of(rng), **timeout_of(rng)))


def embed_texts(on: Target, rng: random.Random) -> None:
    texts: Any = [
        any_of(rng) if rng.random() < 0.2 else text_of(rng) for _ in range(rng.randrange(6))
    ]
    if rng.random() < 0.1:
        texts = rng.choice(
            [any_of(rng), iter(texts), dict.fromkeys(map(str, texts)), {"a"}, (text_of(rng),)]
        )
    llama = rng.choice(on.embedders)
    check(llama.embed_texts(texts, dedup=flag_of(rng), **options_of(rng), **timeout_of(rng)))


def embed_iter(on: Target, rng: random.Random) -> None:
    texts: Any = [text_of(rng) for _ in range(rng.randrange(6))]
    if rng.random() < 0.2:
        texts = any_of(rng)
    size = number_of(rng) if rng.random() < 0.3 else rng.randrange(1, 4)
    for rows in rng.choice(on.embedders).embed_iter(texts, batch_size=size, **options_of(rng)):
        check(rows)


def submit(on: Target, rng: random.Random) -> None:
    texts = [any_of(rng) for _ in range(rng.randrange(4))] if rng.random() < 0.5 else any_of(rng)
    future = rng.choice(on.embedders).submit(texts, block=flag_of(rng), **options_of(rng))
    if rng.random() < 0.1:
        future.cancel()
    else:
        check(future.result(timeout=50))


def rerank(on: Target, rng: random.Random) -> None:
    query = text_of(rng)[:200] if rng.random() < 0.9 else any_of(rng)
    documents: Any = [text_of(rng) for _ in range(rng.randrange(4))]
    if rng.random() < 0.2:
        documents.append(any_of(rng))
    if rng.random() < 0.05:
        documents = any_of(rng)
    llama = rng.choice(on.rerankers)
    check(
        llama.rerank(
            query, documents, truncate=rng.random() < 0.9 or flag_of(rng), **timeout_of(rng)
        )
    )


def vocabulary(on: Target, rng: random.Random) -> None:
    vocab = rng.choice(on.embedders + on.rerankers).model.vocab
    text = text_of(rng) if rng.random() < 0.9 else any_of(rng)
    ids = vocab.tokenize(text, add_special=flag_of(rng), parse_special=flag_of(rng))
    vocab.detokenize(ids, remove_special=flag_of(rng), unparse_special=flag_of(rng))


def detokenize(on: Target, rng: random.Random) -> None:
    vocab = rng.choice(on.embedders + on.rerankers).model.vocab
    call: Callable[..., Any] = rng.choice(
        [vocab.token_to_piece, vocab.is_control, vocab.detokenize]
    )
    call(ids_of(rng) if call == vocab.detokenize else number_of(rng))


def encode(on: Target, rng: random.Random) -> None:
    vocab = rng.choice(on.embedders + on.rerankers).model.vocab
    options: dict[str, Any] = {"limit": rng.choice([0, 1, 2, 3, 20, 100, -1, 2**31 - 1])}
    for name, make in (
        ("truncate", flag_of), ("parse_special", flag_of), ("prefix_ids", ids_of),
        ("suffix_ids", ids_of), ("prefix_text", text_of), ("suffix_text", text_of),
        ("text_only", flag_of), ("limit", number_of),
    ):  # fmt: skip
        if rng.random() < (0.05 if name == "limit" else 0.25):
            options[name] = make(rng)
    Tokenization(vocab, **options).tokenize(any_of(rng), rng.choice([0, 1, -1, 2**62]))


def low_level(on: Target, rng: random.Random) -> None:
    context, batch = rng.choice(on.contexts)
    if rng.random() < 0.7:
        batch.clear()
    if rng.random() < 0.7:
        context.clear()
    for _ in range(rng.randrange(4)):
        seq_id = rng.randrange(4) if rng.random() < 0.8 else number_of(rng)
        pos = None if rng.random() < 0.8 else number_of(rng)
        ids = [rng.randrange(500) for _ in range(rng.randrange(1, 30))]
        with contextlib.suppress(*EXPECTED):
            batch.add(seq_id, ids if rng.random() < 0.8 else ids_of(rng), pos=pos)
    with contextlib.suppress(*EXPECTED):
        context.decode(batch if rng.random() < 0.98 else any_of(rng))
    for call in rng.choices(
        [
            lambda: context.seq_row(rng.randrange(4) if rng.random() < 0.7 else number_of(rng)),
            lambda: context.token_rows(number_of(rng), number_of(rng)),
            lambda: context.token_rows(),
            lambda: context.copy_seq_row(0, np.empty(rng.randrange(40), rng.choice(["f4", "f8"]))),
            lambda: context.copy_seq_row(number_of(rng), ids_of(rng)),
        ],
        k=2,
    ):
        with contextlib.suppress(*EXPECTED):
            call()


def construct(on: Target, rng: random.Random) -> None:
    llama = rng.choice(on.embedders + on.rerankers)
    sizes = {
        n: number_of(rng)
        for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")
        if rng.random() < 0.4
    }
    if rng.random() < 0.3:
        sizes["pooling_type"] = rng.choice([*range(-2, 7), "MEAN", None, 1.0])
    if rng.random() < 0.2:
        sizes["flash_attn"] = rng.choice([True, False, "auto", None, 3, [], "x"])
    if rng.random() < 0.2:
        sizes["n_threads"] = number_of(rng)
    if rng.random() < 0.5:
        with Context(llama.model, **sizes) as context:
            batch = Batch(4)
            batch.add(0, [1, 2])
            context.decode(batch)
    else:
        sizes |= {
            n: number_of(rng)
            for n in ("n_contexts", "pack_tokens", "queue_tokens")
            if rng.random() < 0.2
        }
        sizes.setdefault("n_contexts", 1)
        with Llama(llama.model.path, **sizes) as made:
            made.model.vocab.tokenize("crab")


def objects(on: Target, rng: random.Random) -> None:
    llama = rng.choice(on.embedders + on.rerankers)
    call: Callable[..., Any] = rng.choice(
        [
            Batch,
            PoolingType,
            Model,
            Llama,
            llama.model.chat_template,
            Tokenization,
            type(llama.model.vocab),
        ]
    )
    argument = any_of(rng)
    if call in (Model, Llama) and (argument is None or isinstance(argument, int)):
        return  # None is the default model, an int a file that is open
    call(str(Path("/nowhere") / argument) if call is Llama and type(argument) is str else argument)


CALLS = (
    (embed, 24), (embed_texts, 16), (embed_iter, 4), (submit, 8), (rerank, 14), (vocabulary, 12),
    (detokenize, 6), (encode, 10), (low_level, 5), (objects, 1), (construct, 0.1),
)  # fmt: skip


def run(on: Target, rng: random.Random) -> None:
    [call] = rng.choices([call for call, _ in CALLS], [weight for _, weight in CALLS])
    call(on, rng)
