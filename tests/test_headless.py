"""Without the LM head, decoders give the rows that llama.cpp's own pooling gives with it."""

from __future__ import annotations

import threading
import time

import gguf
import numpy as np
import pytest
from helpers import FAMILIES, RERANKERS, TEXTS, cosines, gguf_path, rewrite_gguf

from llamacrab import Llama, Model
from llamacrab._core import Scheduler, Tokenization
from llamacrab.errors import LlamaTimeoutError, NumericalError
from llamacrab.requests.answers import RankHead

DECODERS = ("tiny-qwen3", "tiny-llama", "tiny-gemma2", "tiny-qwen2")
OTHERS = tuple(name for name in FAMILIES if name not in DECODERS)
BACKENDS = ("ggml", "llamacrab")
SIZES = {"n_contexts": 1, "n_threads": 1}


@pytest.fixture
def both(monkeypatch):
    """Return a function that computes headless and the old way, and says how many graphs were cut.

    It asserts that no head was computed headless, and none left out in the old way.
    """

    def both(compute, model, **keywords):
        results = []
        for switch in ("1", "0"):
            monkeypatch.setenv("LLAMACRAB_HEADLESS", switch)
            with Llama(model, **SIZES | keywords) as llama:
                llama._scheduler._count_heads()  # counts from now on
                results.append(compute(llama))
                n_headless, n_heads = llama._scheduler._count_heads()
                results.append(n_headless)
                assert n_heads == 0
        rows, n_headless, expected, n_old = results
        assert n_old == 0
        return rows, expected, n_headless

    return both


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["LAST", "MEAN", "CLS"])
@pytest.mark.parametrize("name", DECODERS)
def test_headless_rows_equal_those_with_the_head(both, name, pooling, backend):
    def compute(llama):
        packed = llama.embed_texts(TEXTS[:40], truncate=True)
        alone = [llama.embed(text, truncate=True) for text in TEXTS[:3]]
        raw = llama.embed(TEXTS[0], truncate=True, normalize=False)
        return np.vstack([packed, alone, raw])

    rows, expected, n_headless = both(
        compute, gguf_path(name), pooling_type=pooling, cpu_backend=backend, pack_tokens=512
    )
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert cosines(rows[:3], rows[40:43]).min() >= 0.9999
    assert n_headless >= 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODERS)
def test_headless_rows_of_tokens_equal_those_with_the_head(both, name, backend):
    rows, expected, n_headless = both(
        lambda llama: np.vstack(llama.embed_texts(TEXTS[:12], truncate=True)),
        gguf_path(name),
        pooling_type="NONE",
        cpu_backend=backend,
    )
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert n_headless > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["LAST", "NONE"])
@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama", "tiny-gemma2"])
def test_a_text_of_several_ubatches_is_headless(both, name, pooling, backend):
    long = (" ".join(TEXTS[:30]))[:500]
    texts = [long, long[100:300], "short", long[7:450]]

    def compute(llama):
        n_tokens = [len(llama.model.vocab.tokenize(text)) for text in texts]
        assert max(n_tokens) > 3 * llama._scheduler.context.n_ubatch
        return np.vstack(llama.embed_texts(texts))

    rows, expected, n_headless = both(
        compute, gguf_path(name), pooling_type=pooling, cpu_backend=backend, n_ubatch=32
    )
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert n_headless > len(texts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_ubatch", [0, 16])
@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama", "tiny-gemma2"])
def test_a_shared_prefix_is_computed_headless(both, name, n_ubatch, backend):
    prompt = "Instruct: find what a crab would like to read\nQuery: "
    texts = [text[:60] for text in TEXTS[:30]]

    def compute(llama):
        assert llama._scheduler.shares_prefix
        return np.vstack(
            [llama.embed_texts(texts, prompt=prompt), llama.embed_texts(texts[::-1], prompt=prompt)]
        )

    rows, expected, n_headless = both(
        compute, gguf_path(name), pooling_type="LAST", cpu_backend=backend, n_ubatch=n_ubatch
    )
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert n_headless > 1


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_a_head_are_computed_as_before(both, name):
    rows, expected, n_headless = both(
        lambda llama: llama.embed_texts(TEXTS[:10], truncate=True), gguf_path(name)
    )
    np.testing.assert_array_equal(rows, expected)
    assert n_headless == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_a_rank_head_equal_llama_cpps(monkeypatch, backend):
    scores = []
    for is_ours in (True, False):
        with monkeypatch.context() as patch:
            if not is_ours:
                patch.setattr(RankHead, "is_for", lambda model: False)
            with Llama(gguf_path("tiny-qwen3-rank"), cpu_backend=backend, **SIZES) as llama:
                llama._scheduler._count_heads()
                scores.append(llama.rerank("crab", TEXTS[:30], truncate="end"))
                n_headless, n_heads = llama._scheduler._count_heads()
        assert (n_headless > 0) == is_ours
        assert n_heads == 0
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert np.ptp(scores[0]) > 1e-3


@pytest.mark.parametrize("name", [name for name in RERANKERS if name != "tiny-qwen3-rank"])
def test_rerankers_are_computed_as_before(both, name):
    rows, expected, n_headless = both(
        lambda llama: llama.rerank("crab", TEXTS[:10], truncate="end"), gguf_path(name)
    )
    np.testing.assert_array_equal(rows, expected)
    assert n_headless == 0


@pytest.mark.parametrize("kv_unified", [True, False])
def test_sequences_with_caches_of_their_own_are_computed_as_before(kv_unified):
    model = Model(gguf_path("tiny-qwen3"))
    ids = [model.vocab.tokenize(text)[:50] for text in TEXTS[:10]]
    scheduler = Scheduler(
        model,
        n_contexts=1,
        pack_tokens=256,
        n_ctx=1024,
        n_batch=256,
        n_seq_max=7,
        n_threads=1,
        kv_unified=kv_unified,
    )
    try:
        job = scheduler.job(Tokenization(model.vocab, limit=64), len(ids))
        job.add(ids)
        job.seal()
        job.wait()
        assert (scheduler._count_heads()[0] > 0) == kv_unified
    finally:
        scheduler.close()


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_a_graph_that_is_not_as_expected_is_computed_again_with_the_head(pooling):
    with Llama(gguf_path("tiny-qwen3"), pooling_type=pooling, **SIZES) as llama:
        rows = llama.embed_texts(TEXTS[:20], truncate=True)
        n_headless, _ = llama._scheduler._count_heads()
        llama._scheduler._inject("no_hidden_rows")
        for _ in range(2):
            again = llama.embed_texts(TEXTS[:20], truncate=True)
            np.testing.assert_allclose(rows, again, atol=1e-5)
        assert llama._scheduler._count_heads()[0] == n_headless > 0


@pytest.mark.parametrize("kind", ["decode_error", "no_memory", "throws", "not_finite"])
def test_texts_are_computed_again_headless_after_a_fault(kind):
    with Llama(gguf_path("tiny-qwen3"), **SIZES) as llama:
        rows = llama.embed_texts(TEXTS[:20], truncate=True)
        llama._scheduler._inject(kind)
        before, _ = llama._scheduler._count_heads()
        again = llama.embed_texts(TEXTS[:20], truncate=True)  # each text alone
        assert cosines(again, rows).min() >= 0.9999
        assert llama._scheduler._count_heads()[0] > before


@pytest.mark.parametrize("pooling", ["LAST", "MEAN", "CLS"])
def test_a_text_with_nan_fails_alone(tmp_path, pooling):
    source = gguf_path("tiny-qwen3")
    tensor = next(one for one in gguf.GGUFReader(source).tensors if one.name == "token_embd.weight")
    weights = gguf.dequantize(tensor.data, tensor.tensor_type).copy()
    with Llama(source) as llama:
        bad = llama.model.vocab.tokenize("crab")[0]
    weights[bad] = np.nan
    path = rewrite_gguf(source, tmp_path / "nan.gguf", tensors={"token_embd.weight": weights})
    good = [text for text in TEXTS[:40] if text.strip()]
    with Llama(source, pooling_type=pooling, **SIZES) as llama:
        ids = [llama.model.vocab.tokenize(text)[:50] for text in good]
        ids = [one for one in ids if bad not in one]
        expected = llama.embed_texts(ids)
    with Llama(path, pooling_type=pooling, **SIZES) as llama:
        with pytest.raises(NumericalError) as caught:
            llama.embed_texts([*ids[:3], [bad, *ids[3]], *ids[4:]])
        assert caught.value.index == 3
        np.testing.assert_allclose(llama.embed_texts(ids), expected, atol=1e-5)


def test_a_running_headless_pack_can_be_cancelled():
    # All texts fit in the queue, so that `submit` returns when hardly one is computed.
    with Llama(gguf_path("tiny-qwen3"), queue_tokens=10_000_000, **SIZES) as llama:
        expected = llama.embed(TEXTS[0], truncate=True)
        bulk = llama.submit([f"{i} {TEXTS[i % 100]}"[:200] for i in range(20_000)])
        threading.Event().wait(0.05)
        started = time.perf_counter()
        assert bulk.cancel()
        assert time.perf_counter() - started < 5
        np.testing.assert_allclose(llama.embed(TEXTS[0], truncate=True), expected, atol=1e-5)
        with pytest.raises(LlamaTimeoutError):
            llama.embed_texts([f"{i} crabs" for i in range(20_000)], timeout=0.01)
        np.testing.assert_allclose(llama.embed(TEXTS[0], truncate=True), expected, atol=1e-5)
