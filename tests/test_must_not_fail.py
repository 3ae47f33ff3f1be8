"""Failures that users of comparable software met, one test an entry of the list, by its number.

31 (dimensions) and 32 (prompts) are in test_options.py. Two do not apply to what is here yet: 13 is
about images on CUDA, 33 about an adapter for LangChain.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from helpers import (
    EMBEDDERS,
    FAMILIES,
    PAIRS,
    TEXTS,
    check_python,
    cosines,
    gguf_path,
    golden,
    rewrite_gguf,
)

from llamacrab import Batch, Context, Llama, Model, PoolingType, errors
from llamacrab._core import Tokenization
from llamacrab.requests.pair_template import PairTemplate
from llamacrab.requests.reranking import Scoring

BOOL, UINT32 = gguf.GGUFValueType.BOOL, gguf.GGUFValueType.UINT32


@pytest.mark.parametrize("name", EMBEDDERS)
def test_mnf_01_two_texts_are_embedded_and_more_than_fit_in_one_batch(load, name):
    assert load(name).embed_texts(["Hello", "World"]).shape == (2, 32)
    assert load(name).embed_texts([f"Hello {i}" for i in range(1000)]).shape == (1000, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_mnf_02_many_sequences_leave_room_for_long_texts(name):
    with Llama(gguf_path(name), n_seq_max=256, pack_tokens=512) as llama:
        ids = np.full(llama.n_ctx, 30)
        rows = llama.embed_texts([ids, *[[30, 31]] * 300], dedup=False)
    assert np.isfinite(rows).all()


def test_mnf_03_more_tokens_than_n_ubatch_are_refused_not_asserted():
    with Llama(gguf_path("tiny-xlmr"), n_ctx=128, n_ubatch=32) as llama:
        assert llama.n_ctx >= 32
        with pytest.raises(errors.TextTooLongError):
            llama.embed([30] * (llama.n_ctx + 1))
    with Model(gguf_path("tiny-bert")) as model:
        context = Context(model, n_batch=128, n_ubatch=32)
        batch = Batch(128)
        batch.add(0, [30] * 64)
        with pytest.raises(errors.ContextError, match="n_ubatch is 32"):
            context.decode(batch)


def test_mnf_04_the_guard_does_not_ask_whether_a_model_has_an_encoder(load):
    for name in FAMILIES:
        llama = load(name)
        with pytest.raises(errors.TextTooLongError):
            llama.embed([30] * (llama.n_ctx + 1))


def test_mnf_05_every_token_of_a_full_batch_is_an_output(load):
    llama = load("tiny-bert", PoolingType.NONE)
    rows = llama.embed([30] * llama.n_ctx)
    assert rows.shape == (llama.n_ctx, 32)


def test_mnf_06_batch_sizes_follow_from_one_budget():
    for n_ctx in (16, 100, 128):
        with Llama(gguf_path("tiny-bert"), n_ctx=n_ctx) as llama:
            assert llama.embed([30] * n_ctx).shape == (32,)


def test_mnf_07_a_text_between_the_limits_is_cut_or_raises_with_both_numbers():
    with Llama(gguf_path("tiny-qwen3"), n_ctx=300, pooling_type=PoolingType.MEAN) as llama:
        ids = [30] * (llama.n_ctx + 5)
        with pytest.raises(
            errors.TextTooLongError, match=f"{len(ids)} tokens .* {llama.n_ctx} fit"
        ):
            llama.embed(ids)
        assert llama.embed(ids, truncate=True).shape == (32,)


def test_mnf_08_special_tokens_count_and_the_closing_one_is_kept(load):
    llama = load("tiny-bert")
    vocab = llama.model.vocab
    fitting = vocab.tokenize("crab " * 200, add_special=False)[: llama.n_ctx - 2]
    assert len(fitting) == llama.n_ctx - 2
    exact = [*vocab.prefix_ids, *fitting, *vocab.suffix_ids]
    assert cosines(llama.embed("crab " * 200, truncate=True), llama.embed(exact)) > 0.9999


@pytest.mark.parametrize("side", ["end", "start", "middle"])
def test_mnf_08_a_cut_anywhere_keeps_both_special_tokens(load, side):
    llama = load("tiny-bert")
    words = " ".join(TEXTS)
    cut = Tokenization(llama.model.vocab, limit=50, truncate=side).tokenize(words).tolist()
    vocab = llama.model.vocab
    assert (len(cut), cut[0], cut[-1]) == (50, vocab.bos, vocab.sep)


def test_mnf_09_truncation_is_the_same_for_one_text_and_for_a_list(load):
    llama = load("tiny-bert")
    long = "crab " * 500
    one = llama.embed(long, truncate=True)
    many = llama.embed_texts([long, "short", long], truncate=True, dedup=False)
    streamed = next(llama.embed_iter([long], truncate=True))
    future = llama.submit(long, truncate=True).result(timeout=60)
    for row in (many[0], many[2], streamed[0], future):
        assert cosines(row, one) > 0.9999
    for call in (llama.embed, llama.submit, lambda text: llama.embed_texts([text])):
        with pytest.raises(errors.TextTooLongError):
            call(long)


def test_mnf_10_what_can_never_fit_is_refused_and_does_not_loop(load):
    with pytest.raises(errors.TextTooLongError):
        load("tiny-bert").embed_texts(["fits", [30] * 100_000], timeout=60)


@pytest.mark.parametrize("n", [1, 8, 64, 256])
def test_mnf_11_a_list_is_as_good_as_its_texts(load, n):
    llama = load("tiny-xlmr")
    texts = [f"{i} {TEXTS[i % 90]}" for i in range(n)]
    alone = np.array([llama.embed(text) for text in texts])
    assert cosines(llama.embed_texts(texts), alone).min() >= 0.9999


def test_mnf_12_a_deterministic_mode_gives_equal_bits():
    with Llama(gguf_path("tiny-bert"), deterministic=True) as llama:
        alone = llama.embed(TEXTS[0])
        for n in (2, 50):
            assert np.array_equal(llama.embed_texts(TEXTS[:n], truncate=True)[0], alone)


@pytest.mark.parametrize("flag", [True, False])
def test_mnf_14_closing_tokens_follow_the_flags_of_the_gguf(tmp_path, flag):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3"), tmp_path / "m.gguf", {"tokenizer.ggml.add_eos_token": (flag, BOOL)}
    )
    with Model(path) as model:
        assert model.vocab.suffix_ids == ((model.vocab.eos,) if flag else ())


def test_mnf_14_a_gguf_that_lacks_the_flag_is_doubted_once_and_can_be_mended(tmp_path, caplog):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3"), tmp_path / "m.gguf", drop=("tokenizer.ggml.add_eos_token",)
    )
    with Llama(path, n_contexts=2) as llama, Llama(gguf_path("tiny-qwen3")) as whole:
        doubts = [r.getMessage() for r in caplog.records if "add_eos_token" in r.getMessage()]
        assert len(doubts) == 1
        eos = llama.model.vocab.eos
        assert f"end_token={eos}" in doubts[0]
        mended = llama.embed("a crab", end_token=eos)
        assert float(mended @ whole.embed("a crab")) > 0.9999
        assert float(llama.embed("a crab") @ whole.embed("a crab")) < 0.9999


def test_mnf_15_the_closing_token_is_the_id_of_the_metadata(tmp_path):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3"), tmp_path / "m.gguf", {"tokenizer.ggml.eos_token_id": (33, UINT32)}
    )
    with Model(path) as model:
        assert model.vocab.tokenize("crab")[-1] == 33


def test_mnf_16_rows_that_are_not_finite_raise(load):
    llama = load("tiny-bert")
    llama._scheduler._inject("not_finite", times=1)
    with pytest.raises(errors.NumericalError, match="text 0"):
        llama.embed("a crab")
    assert np.isfinite(llama.embed("a crab")).all()


@pytest.mark.parametrize(
    ("pooling", "n_doubts"), [(PoolingType.CLS, 1), (PoolingType.MEAN, 0), (PoolingType.NONE, 0)]
)
def test_mnf_16_a_pooling_that_contradicts_the_gguf_is_doubted_once(caplog, pooling, n_doubts):
    with Llama(gguf_path("tiny-bert"), pooling_type=pooling, n_contexts=3):
        pass
    assert sum("pooling" in record.getMessage() for record in caplog.records) == n_doubts


def test_mnf_17_equal_texts_at_once_get_equal_rows(load):
    llama = load("tiny-qwen3")
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda _: llama.embed("the same crab"), range(200)))
    assert cosines(np.array(rows), rows[0]).min() > 0.9999


def test_mnf_18_threads_share_a_llama_without_crashing():
    check_python(
        """
import sys, threading
from llamacrab import Llama
with Llama(sys.argv[1]) as llama:
    def work():
        for i in range(200):
            assert llama.embed(f"request {i}").shape == (32,)
    threads = [threading.Thread(target=work) for _ in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
""",
        gguf_path("tiny-bert"),
    )


def test_mnf_19_a_vocabulary_is_shared_by_threads(load):
    vocab = load("tiny-xlmr").model.vocab
    want = [vocab.tokenize(text).tolist() for text in TEXTS]
    with ThreadPoolExecutor(16) as threads:
        got = list(threads.map(lambda text: vocab.tokenize(text).tolist(), TEXTS * 5))
    assert got == want * 5


def test_mnf_20_python_goes_on_while_texts_are_computed(minilm):
    beats, stop, n_during = [], threading.Event(), 0

    def beat():
        while not stop.wait(0.001):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    for _ in range(100):  # one call is too short where the CPU is fast, or busy
        start = time.perf_counter()
        minilm.embed_texts(TEXTS[90:120])
        end = time.perf_counter()
        n_during += sum(start < one < end for one in beats)
        if n_during > 20:
            break
    stop.set()
    thread.join()
    assert n_during > 20


def test_mnf_21_ranking_without_a_head_is_refused(tmp_path):
    with pytest.raises(errors.PoolingError, match="needs a classification head"):
        Llama(gguf_path("tiny-bert"), pooling_type=PoolingType.RANK)
    # A causal model may answer instead, but nobody has said how.
    with pytest.raises(errors.PoolingError, match=r"has no rank head .* pass its answers"):
        Llama(gguf_path("tiny-qwen3"), pooling_type=PoolingType.RANK)
    path = rewrite_gguf(
        gguf_path("tiny-qwen3-rank"), tmp_path / "m.gguf", drop=("cls.output.weight",)
    )
    with pytest.raises(errors.LlamaError):
        Llama(path)


def test_mnf_22_a_qwen3_score_is_a_probability_and_not_squashed_twice(load):
    scores = load("tiny-qwen3-rank").rerank(PAIRS["queries"][0], PAIRS["documents"])
    want = golden("tiny-qwen3-rank")["scores"][: len(PAIRS["documents"]), 0]
    np.testing.assert_allclose(scores, want, atol=1e-3)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_mnf_22_a_probability_is_not_squashed_once_more(load, activation):
    llama, pair = load("tiny-qwen3-rank"), (PAIRS["queries"][0], PAIRS["documents"])
    np.testing.assert_allclose(
        llama.rerank(*pair, activation=activation), llama.rerank(*pair), atol=1e-3
    )


def test_mnf_22_a_raw_score_is_squashed_once(load):
    llama, pair = load("tiny-bert-rank"), (PAIRS["queries"][0], PAIRS["documents"])
    want = 1 / (1 + np.exp(-llama.rerank(*pair)))
    np.testing.assert_allclose(llama.rerank(*pair, activation="sigmoid"), want, atol=1e-2)


def test_mnf_23_separators_are_those_of_the_model(load):
    model = load("tiny-xlmr-rank").model
    ids = PairTemplate(model, "q").tokenization(limit=99).tokenize("d").tolist()
    vocab = model.vocab
    assert ids.count(vocab.eos) + (0 if vocab.sep == vocab.eos else ids.count(vocab.sep)) == 3
    assert b"None" not in b"".join(vocab.token_to_piece(i) for i in ids)


@pytest.mark.parametrize("side", [True, "end", "start", "middle"])
def test_mnf_24_a_causal_reranker_keeps_its_closing_template(load, side):
    llama = load("tiny-qwen3-rank")
    template = PairTemplate(llama.model, "who eats crabs?")
    cut = template.tokenization(limit=120, truncate=side).tokenize("crab " * 500)
    assert len(cut) == 120
    text = llama.model.vocab.detokenize(cut)
    before, after = llama.model.chat_template("rerank").split("{document}")
    assert text.startswith(before.replace("{query}", "who eats crabs?"))
    assert text.endswith(after)


def test_mnf_25_a_score_does_not_depend_on_the_other_documents(load):
    llama = load("tiny-bert-rank")
    query, documents = PAIRS["queries"][0], PAIRS["documents"]
    assert llama.rerank(query, documents[:1])[0] == pytest.approx(
        llama.rerank(query, documents)[0], abs=5e-3
    )


def test_mnf_25_a_softmax_over_one_output_is_refused(load):
    with pytest.raises(errors.InputError, match="every score would be 1"):
        load("tiny-bert-rank").rerank("q", ["d"], activation="softmax")


def test_mnf_25_a_head_that_can_only_say_1_is_refused(tmp_path):
    one = gguf.GGUFReader(gguf_path("tiny-qwen3-rank"))
    head = next(t.data for t in one.tensors if t.name == "cls.output.weight")
    path = rewrite_gguf(
        gguf_path("tiny-qwen3-rank"),
        tmp_path / "m.gguf",
        {"qwen3.classifier.output_labels": (["yes"], gguf.GGUFValueType.ARRAY)},
        tensors={"cls.output.weight": np.array(head[:1])},
    )
    with Llama(path) as llama, pytest.raises(errors.UnsupportedModelError, match="with 1"):
        llama.rerank("q", ["d"])


def test_mnf_25_sigmoid_keeps_the_order_and_survives_extremes(load):
    squash = Scoring(load("tiny-bert-rank").model, "sigmoid")
    raw = np.array([[-1e4], [-30], [-2], [0], [3], [1e4]], np.float32)
    squashed = squash(raw)
    assert squashed.dtype == np.float32
    assert (np.diff(squashed) > 0).all()
    np.testing.assert_allclose(squashed[[0, 1, 3, 5]], [0, np.exp(-30), 0.5, 1], rtol=1e-5)


def test_mnf_26_memory_stays_flat_over_many_rerank_calls():
    grown = check_python(
        """
import sys
from llamacrab import Llama

def rss():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

with Llama(sys.argv[1]) as llama:
    for i in range(10_000):
        llama.rerank(f"query {i}", ["a crab", "a lobster"])
        if i == 500:
            before = rss()
    print(rss() - before)
""",
        gguf_path("tiny-bert-rank"),
    )
    assert float(grown) < 1000  # KiB


def test_mnf_27_packs_are_bounded_by_tokens_not_by_texts():
    with Llama(gguf_path("tiny-bert"), pack_tokens=128, n_seq_max=64) as llama:
        llama.embed_texts([[30] * 120] * 50 + [[30] * 3] * 50, dedup=False)
        packs = llama.recent_packs()
    assert (packs["n_tokens"] <= 128).all()


def test_mnf_28_after_a_failure_the_next_call_works(load):
    llama = load("tiny-bert")
    for kind in ("throws", "no_memory", "decode_error"):
        llama._scheduler._inject(kind, times=1)
        with pytest.raises(errors.LlamaError):
            llama.embed("a crab")
        assert llama.embed("a crab", timeout=60).shape == (32,)


def test_mnf_29_no_warning_about_tokens_that_are_no_outputs(load, caplog):
    with caplog.at_level("WARNING", logger="llamacrab"):
        load("tiny-qwen3").embed_texts(TEXTS[:20], truncate=True)
    assert "outputs" not in caplog.text


def test_mnf_30_a_model_without_special_tokens_does_not_crash(tmp_path):
    keys = ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
    path = rewrite_gguf(
        gguf_path("tiny-llama"),
        tmp_path / "m.gguf",
        drop=tuple(f"tokenizer.ggml.{k}" for k in keys),
    )
    check_python(
        "import sys; from llamacrab import Llama\n"
        "with Llama(sys.argv[1]) as llama: assert llama.embed('a crab').shape == (32,)",
        path,
    )
