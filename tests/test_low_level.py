"""Model, Vocab, Batch and Context, driven by hand."""

from __future__ import annotations

import threading
import time

import gguf
import numpy as np
import pytest
from helpers import TEXTS, check_python, cosines, gguf_path, rewrite_gguf

from llamacrab import Batch, Context, Model, PoolingType, VocabType, errors


@pytest.fixture(scope="module")
def bert():
    with Model(gguf_path("tiny-bert")) as model:
        yield model


@pytest.fixture(scope="module")
def qwen():
    with Model(gguf_path("tiny-qwen3")) as model:
        yield model


def test_a_model_says_what_it_is(bert, qwen):
    assert (bert.arch, bert.n_embd, bert.n_embd_out, bert.n_layer) == ("bert", 32, 32, 2)
    assert (bert.n_ctx_train, bert.has_position_table, bert.has_rank_head) == (128, True, False)
    assert (qwen.has_position_table, qwen.pooling_type) == (False, PoolingType.LAST)
    assert bert.metadata["general.architecture"] == "bert"
    assert bert.n_params > 0
    assert bert.size > 0
    with Model(gguf_path("tiny-qwen3-rank")) as rank:
        assert (rank.n_cls_out, rank.cls_labels) == (2, ["yes", "no"])
        assert "{document}" in rank.chat_template("rerank")
        assert rank.chat_template("none such") is None


@pytest.mark.parametrize("name", ["tiny-llama-embed", "tiny-qwen2"])
def test_a_decoder_that_looks_both_ways_is_not_cut_into_ubatches(name):
    with Model(gguf_path(name)) as model:
        context = Context(model, n_batch=128, n_ubatch=32, pooling_type=PoolingType.LAST)
        assert (context.is_causal, context.may_split, context.n_tokens_max) == (False, False, 32)


def test_a_vocabulary_splits_and_joins(bert, qwen):
    assert bert.vocab.vocab_type == VocabType.WPM
    assert qwen.vocab.vocab_type == VocabType.BPE
    ids = qwen.vocab.tokenize("Crabs walk sideways.", add_special=False)
    assert qwen.vocab.detokenize(ids) == "Crabs walk sideways."
    assert b"".join(qwen.vocab.token_to_piece(i) for i in ids) == b"Crabs walk sideways."
    whole = bert.vocab.tokenize("a crab")
    assert (whole[0], whole[-1]) == (bert.vocab.bos, bert.vocab.sep)
    assert bert.vocab.is_control(bert.vocab.sep)
    with pytest.raises(errors.InputError, match="range"):
        bert.vocab.token_to_piece(len(bert.vocab))
    with pytest.raises(errors.InputError, match="range"):
        bert.vocab.detokenize([len(bert.vocab)])


def test_a_model_without_a_vocabulary_takes_token_ids_only(tmp_path):
    fields = gguf.GGUFReader(gguf_path("tiny-llama")).fields
    n_tokens = len(fields["tokenizer.ggml.tokens"].data)
    path = rewrite_gguf(
        gguf_path("tiny-llama"),
        tmp_path / "model.gguf",
        {
            "tokenizer.ggml.model": ("no_vocab", gguf.GGUFValueType.STRING),
            "llama.vocab_size": (n_tokens, gguf.GGUFValueType.UINT32),
        },
        drop=tuple(key for key in fields if key.startswith("tokenizer.")),
    )
    # In a process of its own: llama.cpp asserts.
    check_python(
        """
import sys
from llamacrab import Llama
from llamacrab.errors import UnsupportedModelError
with Llama(sys.argv[1]) as llama:
    assert llama.embed([3, 4, 5]).shape == (32,)
    vocab = llama.model.vocab
    calls = [
        lambda: llama.embed("text"),
        lambda: vocab.tokenize("text"),
        lambda: vocab.detokenize([3]),
        lambda: vocab.token_to_piece(3),
        lambda: vocab.is_control(3),
    ]
    for call in calls:
        try:
            call()
        except UnsupportedModelError as error:
            assert "pass token ids" in str(error)
        else:
            raise AssertionError(call)
""",
        path,
    )


def test_sequences_of_a_batch_have_their_own_rows(bert):
    ids = [bert.vocab.tokenize(text)[:100] for text in TEXTS[:5]]
    with Context(bert, n_batch=512, n_seq_max=5, n_threads=1) as context:
        batch = Batch(512)
        for seq_id in (3, 0, 4, 1, 2):
            batch.add(seq_id, ids[seq_id])
        assert batch.seq_ids == (3, 0, 4, 1, 2)
        context.decode(batch)
        together = [context.seq_row(seq_id) for seq_id in range(5)]
        for seq_id in range(5):
            batch.clear()
            batch.add(0, ids[seq_id])
            context.decode(batch)
            assert cosines(context.seq_row(0), together[seq_id]) > 0.9999


def test_a_causal_sequence_goes_on_where_it_stands(qwen):
    ids = qwen.vocab.tokenize("Crabs walk sideways along the shore.")
    with Context(qwen, n_ctx=256, n_threads=1) as context:
        batch = Batch(64)
        batch.add(0, ids)
        context.decode(batch)
        whole = context.seq_row(0)
        context.clear()
        for start, stop in ((0, 4), (4, len(ids))):
            batch.clear()
            batch.add(0, ids[start:stop], pos=start)
            context.decode(batch)
        assert cosines(context.seq_row(0), whole) > 0.9999
        batch.clear()
        batch.add(0, ids[:2], pos=99)
        with pytest.raises(errors.DecodeError, match="consecutive"):
            context.decode(batch)


def test_a_memory_that_is_full_says_so(qwen):
    with Context(qwen, n_ctx=256, n_seq_max=4, n_threads=1) as context:
        batch = Batch(256)
        batch.add(0, np.full(200, 30))
        context.decode(batch)
        batch.clear()
        batch.add(1, np.full(200, 30))
        with pytest.raises(errors.ContextError, match="no room for 200"):
            context.decode(batch)
        context.clear()
        context.decode(batch)
        assert context.seq_row(1).shape == (32,)


def test_rows_of_tokens_need_pooling_none(bert):
    batch = Batch(64)
    batch.add(0, bert.vocab.tokenize("a crab"))
    n = batch.n_tokens
    with Context(bert, pooling_type=PoolingType.NONE, n_threads=1) as context:
        context.decode(batch)
        rows = context.token_rows()
        assert rows.shape == (n, 32)
        assert np.array_equal(context.token_rows(1, 3), rows[1:3])
        with pytest.raises(errors.InputError, match="not among"):
            context.token_rows(0, n + 1)
        with pytest.raises(errors.PoolingError):
            context.seq_row(0)
    with Context(bert, n_threads=1) as context:
        context.decode(batch)
        with pytest.raises(errors.PoolingError):
            context.token_rows()
        with pytest.raises(errors.InputError, match="sequence 1 is not in the last batch"):
            context.seq_row(1)
        with pytest.raises(errors.InputError, match="a row has 32 values, the array has 7"):
            context.copy_seq_row(0, np.empty(7, np.float32))


def test_a_batch_that_a_context_cannot_take_is_refused_before_llama_cpp_asserts(bert):
    with Context(bert, n_batch=64, n_ubatch=64, n_seq_max=2, n_threads=1) as context:
        batch = Batch(256)
        with pytest.raises(errors.InputError, match="holds no tokens"):
            context.decode(batch)
        batch.add(0, np.full(65, 7))
        with pytest.raises(errors.ContextError, match="65 tokens, n_batch is 64"):
            context.decode(batch)
        for seq_id, token, message in ((2, 7, "n_seq_max=2"), (0, 605, r"range\(605\)")):
            batch.clear()
            batch.add(seq_id, [token])
            with pytest.raises(errors.InputError, match=message):
                context.decode(batch)
        batch.clear()
        batch.add(0, [7], pos=128)
        with pytest.raises(errors.ContextError, match="reaches position 128"):
            context.decode(batch)


def test_contexts_of_one_model_compute_in_threads(bert):
    ids = [bert.vocab.tokenize(text)[:100] for text in TEXTS[:40]]

    def compute(rows):
        with Context(bert, n_threads=1) as context:
            batch = Batch(128)
            for i in range(40):
                batch.clear()
                batch.add(0, ids[i])
                context.decode(batch)
                rows[i] = context.seq_row(0)

    results = [np.zeros((40, 32), np.float32) for _ in range(4)]
    threads = [threading.Thread(target=compute, args=(rows,)) for rows in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in results[1:]:
        assert np.array_equal(rows, results[0])


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-qwen3"])
def test_a_second_thread_in_a_context_is_refused_and_the_first_goes_on(name):
    # llama.cpp itself crashes.
    check_python(
        """
import sys, threading
from llamacrab import Batch, Context, Model
from llamacrab.errors import ContextError

context = Context(Model(sys.argv[1]), n_seq_max=4, n_threads=1)
refused = []

def work(k):
    batch = Batch(256)
    for i in range(300):
        batch.clear()
        for seq_id in range(1 + (i + k) % 4):
            batch.add(seq_id, [30] * (3 + (7 * i + 13 * k) % 30))
        try:
            context.clear()
            context.decode(batch)
            context.seq_row(0)
        except ContextError as error:
            refused.append(str(error))
        except ValueError:
            pass  # what the other thread has decoded meanwhile has no such sequence

threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert any("another thread is using this context" in line for line in refused)
work(0)
""",
        gguf_path(name),
    )


@pytest.mark.parametrize("size", [0, -1, 2**24 + 1, 2**31 - 1])
def test_a_batch_of_a_size_that_memory_cannot_hold_is_refused(size):
    with pytest.raises(errors.ContextError, match=f"1 to 2\\*\\*24 tokens, not {size}"):
        Batch(size)


@pytest.mark.parametrize("row", [np.empty(32), np.empty((4, 32), np.float32), [0.0] * 32, None])
def test_a_row_is_written_into_float32_only(bert, row):
    batch = Batch(8)
    batch.add(0, [2, 7, 3])
    with Context(bert, n_threads=1) as context:
        context.decode(batch)
        with pytest.raises((ValueError, TypeError)):
            context.copy_seq_row(0, row)
        kept = np.zeros((32, 2), np.float32)[:, 0]
        with pytest.raises(ValueError, match="contiguous"):
            context.copy_seq_row(0, kept)
        whole = np.zeros((2, 32), np.float32)
        assert context.copy_seq_row(0, whole[1]) is True
        np.testing.assert_array_equal(whole[1], context.seq_row(0))
        assert not whole[0].any()


def test_sequences_of_a_causal_model_go_on_side_by_side(qwen):
    ids = [qwen.vocab.tokenize(text)[:40] for text in TEXTS[100:103]]
    with Context(qwen, n_ctx=256, n_seq_max=3, n_threads=1) as context:
        batch = Batch(256)
        for start, stop in ((0, 7), (7, 8), (8, 40)):
            batch.clear()
            for seq_id, row in enumerate(ids):
                if len(row[start:stop]):
                    batch.add(seq_id, row[start:stop], pos=start)
            context.decode(batch)
        parts = [context.seq_row(seq_id) for seq_id in range(3)]
        for seq_id, row in enumerate(ids):
            context.clear()
            batch.clear()
            batch.add(0, row)
            context.decode(batch)
            assert cosines(context.seq_row(0), parts[seq_id]) > 0.9999


def test_other_threads_run_while_a_context_decodes(minilm):
    beats = []
    stop = threading.Event()

    def beat():
        while not stop.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.001)

    with Context(minilm.model, n_ctx=512, n_batch=1024, n_seq_max=2, n_threads=1) as context:
        batch = Batch(1024)
        for seq_id in range(2):
            batch.add(seq_id, np.full(500, 2000))
        thread = threading.Thread(target=beat)
        thread.start()
        n_during = 0
        for _ in range(100):  # a busy machine may leave the thread no time for one or two
            context.clear()
            start = time.perf_counter()
            context.decode(batch)
            end = time.perf_counter()
            n_during += sum(start < beat < end for beat in beats)
            if n_during >= 10:
                break
        stop.set()
        thread.join()
    assert n_during >= 10
