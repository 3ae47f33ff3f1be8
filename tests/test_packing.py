"""Packed rows are the rows of texts computed alone, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    CAUSAL,
    EMBEDDERS,
    FAMILIES,
    RERANKERS,
    TEXTS,
    check_python,
    cosines,
    gguf_path,
)

from llamacrab import Llama, PoolingType


def mixed(n: int) -> list[str]:
    """Return `n` different texts of mixed lengths; long ones are few, as they take longest."""
    rng = np.random.default_rng(n)
    return [
        f"{i} {TEXTS[k] if i % 16 == 15 else TEXTS[k][:160]}"
        for i, k in enumerate(rng.integers(0, len(TEXTS), size=n))
    ]


MIXED = mixed(256)


@pytest.fixture(scope="module")
def alone(load):
    """Return a function that gives each of `MIXED` and its row alone, computed once a model."""
    made = {}

    def alone(name):
        if name not in made:
            made[name] = np.array([load(name).embed(text, truncate=True) for text in MIXED])
        return made[name]

    return alone


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 64, 100, 128, 200, 255, 256])
@pytest.mark.parametrize("name", EMBEDDERS)
def test_packed_rows_equal_rows_alone_in_order(load, alone, name, n):
    # Each size begins elsewhere.
    chosen = (n + np.arange(n)) % len(MIXED)
    packed = load(name).embed_texts([MIXED[i] for i in chosen], truncate=True, dedup=False)
    assert cosines(packed, alone(name)[chosen]).min() >= 0.9999


@pytest.mark.parametrize("n", [2, 40, 256])
def test_packed_rows_of_minilm_equal_rows_alone_in_order(minilm, n):
    texts = MIXED[:n] if n < 256 else [text[:24] for text in MIXED]
    alone = np.array([minilm.embed(text, truncate=True) for text in texts])
    packed = minilm.embed_texts(texts, truncate=True, dedup=False)
    assert cosines(packed, alone).min() >= 0.9999


@pytest.mark.parametrize("n_seq_max", [1, 3, 48, 256])
@pytest.mark.parametrize("pack_tokens", [1, 64, 300, 2000])
def test_the_size_of_packs_does_not_change_rows(load, pack_tokens, n_seq_max):
    expected = load("tiny-bert").embed_texts(TEXTS[:80], truncate=True)
    with Llama(gguf_path("tiny-bert"), pack_tokens=pack_tokens, n_seq_max=n_seq_max) as llama:
        rows = llama.embed_texts(TEXTS[:80], truncate=True)
        assert llama.recent_packs()["n_texts"].max() <= n_seq_max
    assert cosines(rows, expected).min() >= 0.9999


@pytest.mark.parametrize("pooling", [PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_pooling_gives_packed_rows_that_equal_rows_alone(load, name, pooling):
    llama = load(name, pooling)
    texts = mixed(60)
    alone = np.array([llama.embed(text, truncate=True) for text in texts])
    packed = llama.embed_texts(texts, truncate=True, dedup=False)
    assert cosines(packed, alone).min() >= 0.9999
    # Rows that are all alike would not show an order that is lost; only the first token of a
    # causal model has nothing before it to tell texts apart.
    if pooling != PoolingType.CLS or name not in CAUSAL:
        assert len(np.unique(alone.round(3), axis=0)) > 50


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_of_tokens_equal_rows_alone(load, name):
    llama = load(name, PoolingType.NONE)
    texts = mixed(50)
    for text, rows in zip(texts, llama.embed_texts(texts, truncate=True), strict=True):
        alone = llama.embed(text, truncate=True)
        assert rows.shape == alone.shape
        assert cosines(rows, alone).min() >= 0.999


@pytest.mark.parametrize("name", RERANKERS)
def test_packed_scores_equal_scores_alone(load, name):
    llama = load(name)
    documents = mixed(60)
    alone = [llama.rerank("a crab", [document], truncate=True)[0] for document in documents]
    scores = llama.rerank("a crab", documents, truncate=True)
    np.testing.assert_allclose(scores, alone, atol=0.02)
    assert len(np.unique(np.round(alone, 4))) > 40


@pytest.mark.parametrize("n_ubatch", [128, 129, 255, 333])
@pytest.mark.parametrize(
    ("name", "pooling"), [("tiny-bert", 1), ("tiny-llama", 1), ("tiny-xlmr", 2)]
)
def test_odd_sizes_of_a_ubatch_do_not_change_rows(load, name, pooling, n_ubatch):
    texts = [text[:60] for text in mixed(60)]
    expected = load(name, PoolingType.MEAN).embed_texts(texts)
    for n_seq_max in (1, 5, 48, 255):
        with Llama(
            gguf_path(name),
            n_ctx=128,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            n_contexts=1,
            n_threads=1,
            pooling_type=PoolingType.MEAN,
        ) as llama:
            rows = llama.embed_texts(texts)
        assert cosines(rows, expected).min() >= 0.9999, n_seq_max


def test_no_combination_of_sizes_ends_the_process():
    # llama.cpp asserts while it plans its memory where n_seq_max does not divide n_ubatch.
    check_python(
        """
        import itertools, sys
        from llamacrab import Llama, LlamaError, PoolingType
        n = 0
        for name, pooling in itertools.product(sys.argv[1:], PoolingType):
            for n_ubatch, n_seq_max in itertools.product((1, 7, 128, 333), (1, 5, 48, 256)):
                try:
                    with Llama(name, pooling_type=pooling, n_ubatch=n_ubatch,
                               n_seq_max=n_seq_max, n_contexts=1, n_threads=1) as llama:
                        if llama.pooling_type == PoolingType.RANK:
                            llama.rerank("a", ["b", "c"], truncate=True)
                        else:
                            llama.embed_texts(["a crab", "b"], truncate=True)
                    n += 1
                except LlamaError:
                    pass
        assert n > 50, n
        """.replace("\n        ", "\n"),
        *map(gguf_path, ("tiny-bert", "tiny-qwen3", "tiny-xlmr-rank", "tiny-modernbert-rank")),
        *map(gguf_path, ("tiny-gemma-embedding", "tiny-gemma2", "tiny-llama-embed", "tiny-qwen2")),
    )
