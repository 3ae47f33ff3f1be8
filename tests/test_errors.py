"""What cannot be done raises the exception that a reader expects, with the numbers in it."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import EMBEDDERS, RERANKERS, TEXTS, check_python, gguf_path, python, rewrite_gguf

from llamacrab import Batch, Context, Llama, LlamaError, Model, PoolingType, errors

ARRAY, FLOAT32, UINT32 = (
    gguf.GGUFValueType.ARRAY,
    gguf.GGUFValueType.FLOAT32,
    gguf.GGUFValueType.UINT32,
)
TOKENS = "tokenizer.ggml.tokens"
PATTERN = "{}.attention.sliding_window_pattern"


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file at") as info:
        Llama(tmp_path / "none.gguf")
    assert isinstance(info.value, errors.ModelNotFoundError)


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model", b"\x00" * 100])
def test_a_file_that_is_no_gguf_is_a_format_error(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(errors.ModelFormatError, match="is not a GGUF"):
        Llama(path)


def test_a_gguf_cut_short_anywhere_is_corrupt(tmp_path):
    whole = gguf_path("tiny-bert").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "model.gguf"
    for size in [4, 8, 24, *rng.integers(24, len(whole) - 1, size=60)]:
        path.write_bytes(whole[:size])
        for use_mmap in (True, False):
            with pytest.raises(errors.ModelCorruptError, match=r"model\.gguf"):
                Model(path, use_mmap=use_mmap)


def test_a_damaged_header_never_ends_the_process(tmp_path):
    check_python(
        """
import sys
import numpy as np
from llamacrab import LlamaError, Model
whole = bytearray(open(sys.argv[1], "rb").read())
rng = np.random.default_rng(0)
refused = 0
for at in rng.integers(4, 3000, size=400):
    broken = whole.copy()
    broken[at] ^= 1 << int(rng.integers(8))
    open(sys.argv[2], "wb").write(broken)
    try:
        Model(sys.argv[2]).close()
    except LlamaError:
        refused += 1
assert refused > 100, refused
""",
        gguf_path("tiny-bert"),
        tmp_path / "broken.gguf",
    )


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("tiny-bert", "bert.block_count", (0, UINT32), "0 layers"),
        ("tiny-bert", "bert.block_count", (513, UINT32), "513 layers"),
        ("tiny-bert", "bert.attention.layer_norm_epsilon", (-1.0, FLOAT32), "epsilon is -1"),
        ("tiny-llama", "llama.attention.layer_norm_rms_epsilon", (np.nan, FLOAT32), "is nan"),
        ("tiny-nomic", "nomic-bert.rope.dimension_count", (0, UINT32), "rotate 0 of a head's 8"),
        ("tiny-nomic", "nomic-bert.rope.dimension_count", (7, UINT32), "rotate 7 of a head's 8"),
        ("tiny-gemma2", "gemma2.rope.dimension_count", (18, UINT32), "rotate 18 of a head's 16"),
        ("tiny-bert", "bert.embedding_length_out", (64, UINT32), "rows have 64 values"),
        ("tiny-gemma-embedding", "gemma-embedding.embedding_length_out", (33, UINT32), "have 33"),
        ("tiny-gemma-embedding", PATTERN.format("gemma-embedding"), (7, UINT32), "of 6 layers"),
        ("tiny-gemma-embedding", PATTERN.format("gemma-embedding"), (1, UINT32), "of 6 layers"),
        ("tiny-modernbert", PATTERN.format("modern-bert"), (1, UINT32), "of 4 layers"),
        ("tiny-modernbert", "modern-bert.attention.head_count", (0, UINT32), "head_count is 0"),
        ("tiny-modernbert", "modern-bert.attention.head_count", (0, FLOAT32), "head_count is 0"),
        # From here on it is llama.cpp that says it.
        ("tiny-nomic-moe", "nomic-bert-moe.expert_used_count", (5, UINT32), "n_expert_used_max"),
        ("tiny-gemma-embedding", "gemma-embedding.dense_2_feat_in", (1, UINT32), "dense_2_feat_in"),
        ("tiny-jina-v2", "jina-bert-v2.feed_forward_length", (7, UINT32), "n_ff"),
        ("tiny-eurobert", "eurobert.attention.key_length", (16, UINT32), "n_embd_head_k"),
    ],
)
def test_values_that_llama_cpp_asserts_on_are_corrupt(tmp_path, name, key, value, message):
    path = rewrite_gguf(gguf_path(name), tmp_path / "model.gguf", {key: value})
    with pytest.raises(errors.ModelCorruptError, match=message):
        Llama(path)


def test_a_token_that_comes_twice_is_corrupt(tmp_path):
    tokens = gguf.GGUFReader(gguf_path("tiny-bert")).fields[TOKENS].contents()
    tokens[50] = tokens[60]
    path = rewrite_gguf(gguf_path("tiny-bert"), tmp_path / "model.gguf", {TOKENS: (tokens, ARRAY)})
    with pytest.raises(errors.ModelCorruptError, match="twice"):
        Model(path)


def test_a_matrix_of_integers_is_corrupt(tmp_path):
    tensors = {"blk.0.attn_q.weight": np.ones((32, 32), dtype=np.int32)}
    path = rewrite_gguf(gguf_path("tiny-bert"), tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(errors.ModelCorruptError, match=r"blk\.0\.attn_q\.weight has integers"):
        Model(path)


@pytest.mark.parametrize("missing", ["blk.1.attn_q.weight", "bert.embedding_length"])
def test_what_a_file_lacks_is_named(tmp_path, missing):
    path = rewrite_gguf(gguf_path("tiny-bert"), tmp_path / "model.gguf", drop=(missing,))
    with pytest.raises(errors.ModelCorruptError, match=missing.replace(".", r"\.")):
        Model(path)


def test_a_modern_bert_without_a_number_of_heads_is_corrupt(tmp_path):
    key, path = "modern-bert.attention.head_count", tmp_path / "model.gguf"
    rewrite_gguf(gguf_path("tiny-modernbert"), path, drop=(key,))
    with pytest.raises(errors.ModelCorruptError, match="head_count is 0 or not a number"):
        Llama(path)


def test_an_unknown_architecture_is_unsupported(tmp_path):
    length = b"\x04\0\0\0\0\0\0\0"
    data = gguf_path("tiny-bert").read_bytes().replace(length + b"bert", length + b"brrt")
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(errors.UnsupportedModelError, match="brrt"):
        Model(path)


def test_weights_that_are_not_finite_give_a_numerical_error(tmp_path):
    tensors = {"blk.1.attn_q.weight": np.full((32, 32), np.nan, dtype=np.float32)}
    path = rewrite_gguf(gguf_path("tiny-bert"), tmp_path / "model.gguf", tensors=tensors)
    with Llama(path) as llama, pytest.raises(errors.NumericalError, match="NaN") as info:
        llama.embed_texts(["one", "two"])
    assert info.value.index in (0, 1)
    with pytest.raises(errors.ModelCorruptError, match="invalid data"):
        Model(path, check_tensors=True)


def test_a_text_for_which_a_vocabulary_has_no_tokens_is_an_input_error(tmp_path):
    reader = gguf.GGUFReader(gguf_path("tiny-llama"))
    tokens = reader.fields[TOKENS].contents()
    spelled = [f"no{token}" if token.startswith("<0x") else token for token in tokens]
    path = rewrite_gguf(
        gguf_path("tiny-llama"), tmp_path / "model.gguf", {TOKENS: (spelled, ARRAY)}
    )
    with Llama(path) as llama:
        assert llama.embed("the").shape == (32,)
        with pytest.raises(errors.InputError, match=r"text 1: .* has no token"):
            llama.embed_texts(["the", "\x01"])
        with pytest.raises(errors.InputError, match="has no token"):
            llama.model.vocab.tokenize("\x01")


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama"])
def test_sizes_that_no_memory_can_hold_are_an_allocation_error(load, name):
    # The mask of attention alone would take two terabytes.
    with pytest.raises(MemoryError, match=r"n_ubatch=1048576.*allocate") as info:
        Context(load(name).model, n_ubatch=2**20)
    assert isinstance(info.value, errors.AllocationError)


def test_a_context_whose_table_of_cells_no_memory_can_hold_is_refused_before_it_is_filled(load):
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("this system does not say how much memory is available")
    available = 1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo.read_text())[1])
    n_ctx = min(2**30, available // 40)  # a cell takes 48 bytes
    if n_ctx == 2**30:
        pytest.skip("this machine can hold the largest table")
    with pytest.raises(errors.AllocationError, match=rf"n_ctx={n_ctx} needs \d+ MiB"):
        Context(load("tiny-llama").model, n_ctx=n_ctx, n_batch=64, n_ubatch=64)


@pytest.mark.parametrize("path", [None, 3, object(), [1]])
def test_what_is_no_path_is_a_type_error(path):
    with pytest.raises(TypeError):
        Model(path)


def test_a_path_with_nul_in_it_is_a_model_error():
    with pytest.raises(errors.ModelError, match="null"):
        Model("a\0b.gguf")


def test_an_encoder_decoder_is_refused():
    with pytest.raises(errors.UnsupportedModelError, match="encoder-decoder"):
        Llama(gguf_path("tiny-t5"))


def test_more_positions_than_the_model_has_are_refused():
    with pytest.raises(errors.ContextError, match="n_ctx=4096 is more than the 128 positions"):
        Llama(gguf_path("tiny-bert"), n_ctx=4096)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_seq_max": 257}, "n_seq_max must be from 1 to 256, not 257"),
        ({"n_seq_max": 0}, "n_seq_max must be from 1"),
        ({"n_batch": 4, "n_seq_max": 8}, "n_batch=4 is less than n_seq_max=8"),
        ({"n_ctx": -1}, "n_ctx must be from 1"),
        ({"n_threads": 100_000}, "n_threads must be from 1"),
        ({"flash_attn": "maybe"}, "flash_attn must be"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(sizes, message):
    with Model(gguf_path("tiny-bert")) as model, pytest.raises(ValueError, match=message) as info:
        Context(model, **sizes)
    assert isinstance(info.value, errors.ContextError)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"n_contexts": -1}, "n_contexts must be from 1 to 512, not -1"),
        # They took all memory of the machine, one after the other.
        ({"n_contexts": 2**31 - 1}, "n_contexts must be from 1 to 512, not 2147483647"),
        ({"pack_tokens": -5}, "pack_tokens must be at least 1, not -5"),
        ({"queue_tokens": -1}, "queue_tokens must not be negative"),
        ({"n_seq_max": 300}, "n_seq_max must be from 1 to 256, not 300"),
        ({"n_ubatch": -1}, "n_ubatch must be from 1"),
        ({"n_threads": -1}, "n_threads must be from 1 to 512, not -1"),
    ],
)
def test_a_llama_refuses_sizes_that_cannot_be(size, message):
    # In a process of its own, which -1 contexts once ended.
    done = python(
        f"import sys; from llamacrab import Llama\nLlama(sys.argv[1], **{size})",
        gguf_path("tiny-bert"),
    )
    assert done.returncode == 1
    assert f"ContextError: {message}" in done.stderr


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_text_that_is_too_long_says_how_long_and_what_fits(load, name):
    llama = load(name)
    text = " ".join(TEXTS)
    n_tokens = len(llama.model.vocab.tokenize(text))
    with pytest.raises(errors.TextTooLongError, match="pass truncate=True") as info:
        llama.embed_texts(["short", text])
    error = info.value
    assert (error.n_tokens, error.limit, error.index) == (n_tokens, llama.n_ctx, 1)


CUT = "pass truncate=True to cut it"
CUT_DOCUMENT = "pass truncate=True to cut the document"
LARGER = ", or make the Llama with a larger n_ctx, up to 128"
WINDOWS = ", or chunk=True to average over windows of it"


@pytest.mark.parametrize(
    ("name", "how", "advice"),
    [
        ("tiny-bert", {}, CUT + WINDOWS),  # it has no more positions
        ("tiny-bert", {"n_ctx": 32}, CUT + WINDOWS + LARGER),
        ("tiny-bert", {"n_ubatch": 32}, CUT + WINDOWS + ", or make the Llama with n_ubatch=128"),
        ("tiny-bert", {"pooling_type": PoolingType.NONE}, CUT),
        ("tiny-nomic", {}, CUT + WINDOWS),  # it has others, but was trained on no more
        ("tiny-bert-rank", {}, CUT_DOCUMENT),
        ("tiny-bert-rank", {"n_ctx": 32}, CUT_DOCUMENT + LARGER),
    ],
)
def test_a_text_that_is_too_long_gets_advice_that_this_model_can_follow(name, how, advice):
    with Llama(gguf_path(name), **how) as llama:
        call = partial(llama.rerank, "query") if "rank" in name else llama.embed_texts
        with pytest.raises(errors.TextTooLongError, match=f"fit: {re.escape(advice)}$"):
            call([" ".join(TEXTS * 20)])
        if "rank" not in name:
            with pytest.raises(errors.TextTooLongError, match=f"fit: {re.escape(advice)}$"):
                call([[7] * 10_000])


@pytest.mark.parametrize("path", ["intfloat/e5-small", "nomic-ai/nomic-embed-text-v1.5"])
def test_a_name_on_hugging_face_is_no_path_and_names_convert(path):
    with pytest.raises(
        errors.ModelNotFoundError, match=f"no model file at {path}: .* `llamacrab con"
    ):
        Llama(path)


@pytest.mark.parametrize("path", ["missing.gguf", "models/missing.gguf", "a/b/c", "missing"])
def test_a_path_with_nothing_there_says_no_more(path):
    with pytest.raises(errors.ModelNotFoundError, match=f"no model file at {path}$"):
        Llama(path)


def test_a_folder_names_what_to_do_with_what_it_holds(tmp_path):
    with pytest.raises(errors.ModelError, match=r"is a folder: pass the path of a GGUF file$"):
        Llama(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        errors.ModelError, match=r"is a folder: .*`llamacrab convert .* -o model\.gguf`"
    ):
        Model(tmp_path)
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    with pytest.raises(errors.ModelError, match=r"is a folder: pass .*a\.gguf, the first of its 2"):
        Model(tmp_path)


def test_weights_of_hugging_face_name_convert(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(errors.ModelFormatError, match=r"not a GGUF.*`llamacrab convert"):
        Model(weights)


def test_a_query_without_room_is_to_be_shortened():
    with (
        Llama(gguf_path("tiny-bert-rank")) as llama,
        pytest.raises(
            errors.ContextError, match=r"stands around it: shorten the prompt or the query$"
        ),
    ):
        llama.rerank("crab " * 500, ["document"], truncate=True)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_cut_text_keeps_its_closing_tokens(load, name):
    llama = load(name)
    vocab = llama.model.vocab
    whole = vocab.tokenize(" ".join(TEXTS))
    kept = llama.n_ctx - len(vocab.suffix_ids)
    cut = np.concatenate([whole[:kept], np.array(vocab.suffix_ids, dtype=np.int32)])
    row = llama.embed(" ".join(TEXTS), truncate=True)
    assert float(row @ llama.embed(cut)) > 0.9999
    assert float(row @ llama.embed(whole, truncate=True)) > 0.9999


def test_a_context_too_small_for_the_special_tokens_says_so():
    with Llama(gguf_path("tiny-bert"), n_ctx=2) as llama:
        with pytest.raises(errors.ContextError, match="of 2 tokens none is left for the text"):
            llama.embed("a crab", truncate=True)
        assert llama.embed("").shape == (32,)


@pytest.mark.parametrize("wrong", [None, 7, 3.5, b"bytes", object(), {"text"}, [1.5], [[1]], ["a"]])
def test_what_is_neither_text_nor_ids_is_an_input_error(load, wrong):
    with pytest.raises(errors.InputError):
        load("tiny-bert").embed_texts(["a crab", wrong])


@pytest.mark.parametrize("ids", [[-1], [605], [2**31], [2**40], [-(2**70)], [[1], [2, 3]], [True]])
def test_ids_outside_the_vocabulary_are_an_input_error_that_names_the_text(load, ids):
    with pytest.raises(errors.InputError, match=r"range\(605\)|32 bits|integers"):
        load("tiny-bert").embed(ids)
    with pytest.raises(errors.InputError, match="text 2: "):
        load("tiny-bert").embed_texts(["a", [604], ids])


@pytest.mark.parametrize("wrong", [7, b"bytes", memoryview(b"bytes"), iter("ab")])
def test_what_is_no_text_is_named(load, wrong):
    with pytest.raises(errors.InputError, match=f"text 1 is {type(wrong).__name__}, not str"):
        load("tiny-bert").embed_texts(["a crab", wrong])


def test_an_error_in_the_middle_tells_which_rows_are_done(load):
    with pytest.raises(errors.InputError, match="text 1000") as info:
        load("tiny-bert").embed_texts([*(f"text {i}" for i in range(1000)), [10**6]])
    rows, done = info.value.rows, info.value.done
    assert rows.shape == (1001, 32)
    assert not done[1000]
    np.testing.assert_array_equal(done, np.linalg.norm(rows, axis=1) > 0.5)


def test_no_ids_are_an_empty_input_error(load):
    with pytest.raises(errors.EmptyInputError, match="text 0 has no tokens"):
        load("tiny-bert").embed([])


@pytest.mark.parametrize("call", ["embed_texts", "rerank"])
def test_one_text_instead_of_a_list_is_an_input_error(load, call):
    name = "tiny-bert" if call == "embed_texts" else "tiny-bert-rank"
    arguments = ("text",) if call == "embed_texts" else ("query", "document")
    with pytest.raises(errors.InputError, match="takes a list"):
        getattr(load(name), call)(*arguments)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_reranking_needs_a_rank_head(load, name):
    with pytest.raises(errors.PoolingError, match="no classification head"):
        load(name).rerank("query", ["document"])
    with Model(gguf_path(name)) as model:
        refusal = (
            r"has no rank head \(no classification head\).*answers="
            if model.is_causal
            else "pooling RANK needs a classification head"
        )
    with pytest.raises(errors.PoolingError, match=refusal):
        Llama(gguf_path(name), pooling_type=PoolingType.RANK)


@pytest.mark.parametrize("name", RERANKERS)
def test_a_reranker_does_not_embed(load, name):
    with pytest.raises(errors.PoolingError, match=r"use rerank\(\)"):
        load(name).embed("text")


def test_a_closed_llama_says_so():
    llama = Llama(gguf_path("tiny-bert"))
    llama.close()
    llama.close()
    for call in (lambda: llama.embed("x"), lambda: llama.embed_texts(["x"]), llama.stats):
        with pytest.raises(errors.ClosedError):
            call()
    assert "closed" in repr(llama)


def test_nothing_is_embedded_into_no_rows(load):
    assert load("tiny-bert").embed_texts([]).shape == (0, 32)
    assert list(load("tiny-bert").embed_iter([])) == []
    assert load("tiny-bert-rank").rerank("query", []).shape == (0,)


def test_every_error_is_a_llama_error_and_a_builtin():
    plain = {errors.LlamaError, errors.ModelError, errors.CancelledError}
    kinds = [kind for kind in vars(errors).values() if getattr(kind, "__mro__", ())[-2:-1]]
    kinds = [kind for kind in kinds if kind.__module__ == errors.__name__]
    assert len(kinds) > 15
    for kind in set(kinds) - plain:
        assert issubclass(kind, LlamaError)
        builtins = {base for base in kind.__mro__ if base.__module__ == "builtins"}
        assert builtins - {Exception, BaseException, object}, kind


def test_a_batch_refuses_what_does_not_fit():
    batch = Batch(4)
    with pytest.raises(errors.ContextError, match="5 more tokens do not fit: the batch holds 0"):
        batch.add(0, [1] * 5)
    with pytest.raises(errors.InputError, match="sequence 0 has no tokens"):
        batch.add(0, [])
    with pytest.raises(errors.InputError, match=r"seq_id 256 is not in range\(256\)"):
        batch.add(256, [1])
    with pytest.raises(errors.InputError, match="cannot start at position -1"):
        batch.add(0, [1], pos=-1)
    with pytest.raises(errors.ContextError):
        Batch(0)
