"""Vectors, token ids and scores are those of sentence-transformers and transformers."""

import numpy as np
import pytest
from helpers import (
    EMBEDDERS,
    FAMILIES,
    PAIRS,
    RERANKERS,
    TEXTS,
    cosines,
    gguf_path,
    golden,
    ragged,
)

from llamacrab import Llama, PoolingType, fetch_default_model
from llamacrab.requests.pair_template import PairTemplate

POOLINGS = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "last": PoolingType.LAST}
# transformers computes GELU exactly, llama.cpp by a table in half precision.
SCORE_TOLERANCE = {
    "tiny-bert-rank": 0.02,
    "tiny-xlmr-rank": 0.02,
    "tiny-qwen3-rank": 1e-3,
    "tiny-modernbert-rank": 0.005,
    "tiny-modernbert-rank-cls": 0.005,
}


def test_minilm_token_ids_equal_those_of_transformers(minilm):
    for text, want in zip(TEXTS, ragged(golden("minilm")), strict=True):
        np.testing.assert_array_equal(minilm.model.vocab.tokenize(text), want, err_msg=text)


def test_minilm_vectors_by_default_have_cosine_0_9999_to_sentence_transformers(minilm):
    vectors = minilm.embed_texts(TEXTS)
    assert vectors.shape == (200, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert cosines(vectors, golden("minilm")["vectors"]).min() >= 0.9999


@pytest.mark.parametrize(("outtype", "least"), [("f32", 0.99999), ("q8_0", 0.997)])
def test_minilm_vectors_of_other_types_stay_close(outtype, least):
    some = [*range(0, 160, 2), 169]  # short ones, and one of the longest
    with Llama(fetch_default_model(outtype)) as llama:
        vectors = llama.embed_texts([TEXTS[i] for i in some])
    assert cosines(vectors, golden("minilm")["vectors"][some]).min() >= least


@pytest.mark.parametrize("name", FAMILIES)
def test_token_ids_equal_those_of_transformers(load, name):
    want = golden(name)
    for text_id, ids in zip(want["text_ids"], ragged(want), strict=True):
        got = load(name).model.vocab.tokenize(TEXTS[text_id])
        np.testing.assert_array_equal(got, ids, err_msg=TEXTS[text_id])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_of_each_pooling_equal_those_of_transformers(load, name, pooling):
    want = golden(name)
    texts = [TEXTS[i] for i in want["text_ids"]]
    vectors = load(name, POOLINGS[pooling]).embed_texts(texts)
    assert cosines(vectors, want[pooling]).min() >= 0.9999


@pytest.mark.parametrize("name", FAMILIES)
def test_unspecified_pooling_is_what_the_gguf_says_else_mean(load, name):
    want = golden(name)
    llama = load(name)
    assert llama.pooling_type.name == FAMILIES[name]
    vectors = llama.embed_texts([TEXTS[i] for i in want["text_ids"]])
    assert cosines(vectors, want["vectors"]).min() >= 0.9999


def test_tiny_llama_says_nothing_of_pooling(load):
    assert load("tiny-llama").model.pooling_type == PoolingType.UNSPECIFIED


def test_pooling_none_gives_the_hidden_state_of_every_token(load):
    want = golden("tiny-bert")
    texts = [TEXTS[i] for i in want["token_text_ids"]]
    states = ragged(want, "token_vectors", "token_offsets")
    rows = load("tiny-bert", PoolingType.NONE).embed_texts(texts, normalize=False)
    assert [len(row) for row in rows] == [len(state) for state in states]
    for row, state in zip(rows, states, strict=True):
        np.testing.assert_allclose(row, state, atol=0.02)
        assert cosines(row, state).min() >= 0.9999


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_equal_those_of_transformers(load, name):
    llama = load(name)
    scores = [llama.rerank(query, PAIRS["documents"]) for query in PAIRS["queries"]]
    want = golden(name)["scores"][:, 0].reshape(len(PAIRS["queries"]), -1)
    np.testing.assert_allclose(scores, want, atol=SCORE_TOLERANCE[name])


@pytest.mark.parametrize("name", RERANKERS)
def test_pair_ids_equal_those_of_transformers(load, name):
    want = golden(name)
    model = load(name).model
    for (query, document), ids in zip(want["pairs"], ragged(want), strict=True):
        template = PairTemplate(model, PAIRS["queries"][query])
        got = template.tokenization(limit=512).tokenize(PAIRS["documents"][document])
        np.testing.assert_array_equal(got, ids)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_flash_attention_does_not_change_vectors(name, flash_attn):
    want = golden(name)
    with Llama(gguf_path(name), flash_attn=flash_attn) as llama:
        vectors = llama.embed_texts([TEXTS[i] for i in want["text_ids"]])
    assert cosines(vectors, want["vectors"]).min() >= 0.9999


def test_ids_of_a_text_give_the_vector_of_the_text(load):
    for name in EMBEDDERS:
        llama = load(name)
        ids = llama.model.vocab.tokenize(TEXTS[40])
        by_ids = llama.embed_texts([ids, ids.tolist(), tuple(ids.tolist())], dedup=False)
        assert cosines(by_ids, llama.embed(TEXTS[40])).min() >= 0.99999


def test_normalize_false_keeps_the_length_of_vectors(load):
    llama = load("tiny-bert")
    raw = llama.embed_texts(TEXTS[:8], normalize=False)
    norms = np.linalg.norm(raw, axis=1)
    assert abs(norms - 1).min() > 0.01
    np.testing.assert_allclose(raw / norms[:, None], llama.embed_texts(TEXTS[:8]), atol=1e-5)


def test_start_token_false_leaves_out_the_first_special_token(load):
    llama = load("tiny-bert")
    ids = llama.model.vocab.tokenize("hello")
    np.testing.assert_allclose(
        llama.embed("hello", start_token=False), llama.embed(ids[1:]), atol=1e-6
    )
    assert cosines(llama.embed("hello", start_token=False), llama.embed("hello")) < 0.9999
