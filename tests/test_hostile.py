"""Whatever a text holds, it is embedded or refused: the process never dies or hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from helpers import EMBEDDERS, FAMILIES, Reader, check_python, cosines, gguf_path, rewrite_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacrab import Llama
from llamacrab._core import Tokenization
from llamacrab.errors import ModelCorruptError

ODD = [
    "",
    " ",
    "\n\t \r",
    "\x00",
    "nul \x00 inside",
    "".join(map(chr, range(32))) + "\x7f",
    "\ud800",
    "lone \udfff and \ud83d surrogates",
    "\U0001f980\U0001f469\u200d\U0001f52c\U0001f1e9\U0001f1ea\U0001f44b\U0001f3fd",
    "\ufeff\u200b\u200e\u202e\u2066",
    "e\u0301\u0323\u0301" * 20,
    "\ufdfa" * 30,
    "[CLS] [SEP] <s> </s> <|im_start|> <|endoftext|> [MASK]",
    "\U0010ffff\ue000\ufffe\uffff",
]


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_odd_texts_give_finite_rows(load, name, parse_special):
    rows = load(name).embed_texts(ODD, truncate=True, parse_special=parse_special)
    assert rows.shape == (len(ODD), 32)
    assert np.isfinite(rows).all()


def test_a_character_of_every_block_is_embedded_by_every_vocabulary(load):
    texts = [chr(code) * 3 for code in range(1, 0x30000, 0x80)]
    for name in EMBEDDERS:
        assert np.isfinite(load(name).embed_texts(texts, truncate=True)).all()


def test_a_lone_surrogate_reads_as_the_replacement_character(load):
    vocab = load("tiny-qwen3").model.vocab
    assert vocab.tokenize("a\ud800b").tolist() == vocab.tokenize("a\ufffdb").tolist()
    assert vocab.tokenize("\ud83d\ude00").tolist() == vocab.tokenize("\U0001f600").tolist()


def test_special_tokens_are_read_in_a_text_only_on_request(load):
    vocab = load("tiny-bert").model.vocab
    assert vocab.sep not in vocab.tokenize("a [SEP] b", add_special=False)
    assert vocab.sep in vocab.tokenize("a [SEP] b", add_special=False, parse_special=True)
    llama = load("tiny-bert")
    plain, parsed = llama.embed("a [SEP] b"), llama.embed("a [SEP] b", parse_special=True)
    assert cosines(plain, parsed) < 0.9999


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tiny-llama", "llama.nextn_predict_layers", 256),
        ("tiny-bert", "bert.expert_used_count", 3),
        ("tiny-bert", "bert.attention.head_count", 3),
        ("tiny-qwen3", "qwen3.attention.head_count_kv", 3),
        ("tiny-qwen3", "qwen3.attention.key_length", 6),
    ],
)
def test_numbers_of_a_gguf_that_contradict_each_other_do_not_end_the_process(
    tmp_path, name, key, value
):
    path = rewrite_gguf(
        gguf_path(name), tmp_path / "model.gguf", {key: (value, gguf.GGUFValueType.UINT32)}
    )
    check_python(
        """
import sys
from llamacrab import Llama
from llamacrab.errors import ModelCorruptError
for _ in range(3):
    try:
        Llama(sys.argv[1])
    except ModelCorruptError as error:
        print(error)
    else:
        raise AssertionError
""",
        path,
    )


def test_a_vocabulary_that_would_be_split_for_ever_is_refused(tmp_path):
    source, path = gguf_path("tiny-xlmr"), tmp_path / "model.gguf"
    fields = {"tokenizer.ggml.model": ("rwkv", gguf.GGUFValueType.STRING)}
    rewrite_gguf(source, path, fields)
    with pytest.raises(ModelCorruptError, match="lacks tokens of single bytes"):
        Llama(path)
    tokens = Reader(source).fields["tokenizer.ggml.tokens"].contents()
    tokens = [f"\\x{i:02x}" if i < 256 else f"crab{i}" for i in range(len(tokens))]
    fields["tokenizer.ggml.tokens"] = (tokens, gguf.GGUFValueType.ARRAY)
    with Llama(rewrite_gguf(source, path, fields)) as llama:
        ids = llama.model.vocab.tokenize("a crab256", add_special=False)
        assert ids.tolist() == [*b"a ", 256]


def test_more_threads_than_the_system_gives_are_an_allocation_error():
    code = """
import sys
from llamacrab import Llama
from llamacrab.errors import AllocationError
try:
    Llama(sys.argv[1], n_contexts=4, n_threads=1)
except AllocationError as error:
    assert "cannot start 4 threads" in str(error), error
else:
    raise AssertionError
"""
    # Stacks of 1 GB, in 3 GB.
    limits = 'ulimit -s 1000000 && ulimit -v 3000000 && exec "$0" -c "$@"'
    subprocess.run(
        ["bash", "-c", limits, sys.executable, code, gguf_path("tiny-bert")],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )


def test_memory_that_is_not_there_for_a_context_is_an_allocation_error():
    check_python(
        """
import resource, sys
from llamacrab import Llama
from llamacrab.errors import AllocationError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    Llama(sys.argv[1], n_contexts=400, n_threads=1, pack_tokens=16, n_ctx=16)
except AllocationError as error:
    assert "insufficient memory" in str(error), error
else:
    raise AssertionError
""",
        gguf_path("tiny-bert"),
    )


def test_ids_around_a_text_that_no_vocabulary_holds_are_refused(load):
    vocab = load("tiny-bert").model.vocab
    for ids in ([605], [-1], [1.5], [[1]], ["a"]):
        with pytest.raises(ValueError, match=r"range\(605\)|integers"):
            Tokenization(vocab, limit=20, suffix_ids=ids)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text_is_embedded(load, text):
    for name in EMBEDDERS:
        assert np.isfinite(load(name).embed(text, truncate=True)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-10, 700), max_size=40))
def test_any_ids_are_embedded_or_refused(load, ids):
    try:
        row = load("tiny-bert").embed(ids, truncate=True)
    except ValueError:
        assert not ids or min(ids) < 0 or max(ids) >= 605
    else:
        assert np.isfinite(row).all()


@pytest.mark.parametrize("name", EMBEDDERS)
def test_texts_of_ten_megabytes_are_cut_or_refused(name):
    # Ten megabytes of what splits worst; one of the rest, which takes seconds less.
    check_python(
        """
import sys
from llamacrab import Llama
from llamacrab.errors import InputError

def refused(text, name):
    try:
        llama.embed(text)
    except InputError as error:
        assert "pass truncate=True" in str(error), (name, error)
        return True
    return False

size = 1_000_000
texts = {
    "one word": "a" * size,
    "spaces": " " * size,
    "line breaks": "\\n" * size,
    "words": "crab and " * (size // 9),
    "chinese": "\\u87f9" * (size // 3),
    "signs": "!?" * (size // 2),
    "digits": "12345" * (size // 5),
    "emoji": "\\U0001f980" * (size // 4),
}
with Llama(sys.argv[1], n_contexts=1, n_threads=1) as llama:
    for name, text in texts.items():
        assert llama.embed(text, truncate=True).shape == (32,), name
        refused(text, name)
    assert refused(texts["one word"] * 10, "one word")
    assert llama.embed(texts["spaces"] * 10, truncate=True).shape == (32,)
""",
        gguf_path(name),
        timeout=280,
    )


@pytest.mark.parametrize("splitter", ["default", "deepseek-llm", "tekken", "bloom"])
def test_stretches_without_a_break_do_not_overflow_the_stack(tmp_path, splitter):
    # These split by std::regex, which recurses once a character: 25,000 ended the process.
    path = rewrite_gguf(
        gguf_path("tiny-qwen3"),
        tmp_path / "model.gguf",
        {"tokenizer.ggml.pre": (splitter, gguf.GGUFValueType.STRING)},
    )
    check_python(
        """
import sys, threading
from llamacrab import Llama

def work():
    with Llama(sys.argv[1]) as llama:
        for piece in ("a", "A", " ", "\\n", "\\t ", "7", "!", "\\u6c34", "a\\u0301", "\\x1ca"):
            row = llama.embed(piece * 60_000, truncate=True)
            assert row.shape == (32,), piece

work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("done")
""",
        path,
    )


def test_a_cut_stretch_has_the_tokens_of_the_whole_where_punctuation_breaks_it(load):
    vocab = load("tiny-qwen3").model.vocab
    sentence = "\u7a7a\u6c14\u5728\u6c34\u4e0a\uff0cthe-crab\u3002"
    once = vocab.tokenize(sentence * 100, add_special=False)
    many = vocab.tokenize(sentence * 5000, add_special=False)
    np.testing.assert_array_equal(many, np.tile(once, 50))


def test_long_texts_of_bytes_have_the_tokens_of_the_whole(load):
    # SPM: above 64 KiB the text is cut, unless special tokens are to be read in it.
    vocab = load("tiny-llama").model.vocab
    rng = np.random.default_rng(0)
    for letters in ("\n", "\u6c34", "ab \n\u6c34\U0001f980\u2581", "the crab \n"):
        text = "".join(rng.choice(list(letters), size=90_000))
        whole = vocab.tokenize(text, parse_special=True)
        np.testing.assert_array_equal(vocab.tokenize(text), whole)
