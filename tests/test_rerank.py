"""Reranking: order, pairs and templates."""

from __future__ import annotations

import asyncio
import dataclasses

import gguf
import numpy as np
import pytest
from helpers import PAIRS, RERANKERS, gguf_path, rewrite_gguf

from llamacrab import Llama, Model, PoolingType, RerankResult, errors
from llamacrab.requests.pair_template import PairTemplate


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_do_not_depend_on_order_or_neighbours(load, name):
    llama = load(name)
    query, documents = PAIRS["queries"][0], PAIRS["documents"]
    scores = llama.rerank(query, documents)
    assert scores.shape == (len(documents),)
    assert scores.dtype == np.float32
    alone = np.concatenate([llama.rerank(query, [document]) for document in documents])
    np.testing.assert_allclose(alone, scores, atol=5e-3)
    np.testing.assert_allclose(llama.rerank(query, documents[::-1]), scores[::-1], atol=5e-3)


@pytest.mark.parametrize("name", RERANKERS)
def test_only_the_document_is_cut(load, name):
    llama = load(name)
    template = PairTemplate(llama.model, "who eats crabs?")
    full = template.tokenization(limit=10_000).tokenize("gulls " * 400).tolist()
    cut = template.tokenization(limit=100, truncate=True).tokenize("gulls " * 400).tolist()
    head = template.tokenization(limit=10_000).tokenize("").tolist()
    n_tail = len(template._suffix_ids)
    assert len(cut) == 100
    assert cut[-n_tail:] == full[-n_tail:] == head[-n_tail:]
    assert cut[:-n_tail] == full[: 100 - n_tail]
    # The last token of what leads to the document may be split together with its first word.
    assert cut[: len(head) - n_tail - 1] == head[: -n_tail - 1]
    with pytest.raises(errors.TextTooLongError) as info:
        template.tokenization(limit=100).tokenize("gulls " * 400)
    assert info.value.n_tokens == len(full)


def test_a_query_that_leaves_no_room_says_so(load):
    llama = load("tiny-bert-rank")
    with pytest.raises(errors.ContextError, match="none is left for the text"):
        llama.rerank("crab " * 500, ["document"], truncate=True)


def test_special_tokens_in_a_query_or_document_stay_text(load):
    model = load("tiny-qwen3-rank").model
    end = model.vocab.tokenize("<|im_end|>", add_special=False, parse_special=True)
    assert len(end) == 1
    plain = PairTemplate(model, "q").tokenization(limit=500).tokenize("d")
    odd = PairTemplate(model, "q <|im_end|>").tokenization(limit=500).tokenize("d <|im_end|>")
    assert (odd == end[0]).sum() == (plain == end[0]).sum()


def test_a_query_that_spells_a_placeholder_stays_a_query(load):
    model = load("tiny-qwen3-rank").model
    text = model.vocab.detokenize(
        PairTemplate(model, "what is {document}?")
        .tokenization(limit=500)
        .tokenize("a crab {query}")
    )
    assert "what is {document}?" in text
    assert "a crab {query}" in text


def test_a_template_without_a_document_is_refused(tmp_path):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3-rank"),
        tmp_path / "odd.gguf",
        {"tokenizer.chat_template.rerank": ("only {query}", gguf.GGUFValueType.STRING)},
    )
    with (
        Llama(path, pooling_type=PoolingType.RANK) as llama,
        pytest.raises(errors.UnsupportedModelError, match="exactly once"),
    ):
        llama.rerank("q", ["d"])


def test_a_reranker_used_as_an_embedder_says_how_to_rerank():
    with Llama(gguf_path("tiny-bert-rank"), pooling_type=PoolingType.CLS) as llama:
        assert llama.embed("a crab").shape == (32,)
        with pytest.raises(errors.PoolingError, match=r"pooling_type=PoolingType\.RANK"):
            llama.rerank("q", ["d"])


def test_pairs_of_a_model_without_template_are_those_of_llama_server(load):
    with Model(gguf_path("tiny-xlmr-rank")) as model:
        vocab = model.vocab
        ids = PairTemplate(model, "query").tokenization(limit=500).tokenize("document").tolist()
        query = vocab.tokenize("query", add_special=False).tolist()
        document = vocab.tokenize("document", add_special=False).tolist()
        bos, eos, sep = vocab.bos, vocab.eos, vocab.sep
        assert ids == [bos, *query, eos, sep, *document, eos]


def test_a_head_of_one_matrix_scores_the_first_token_through_tanh(load, tmp_path):
    # What llama.cpp makes of jina-reranker-v1, whose own head has a matrix more: docs/models.md.
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(1, 32)).astype(np.float32) / 6
    path = rewrite_gguf(
        gguf_path("tiny-jina-v2"),
        tmp_path / "model.gguf",
        {"jina-bert-v2.pooling_type": (PoolingType.RANK, gguf.GGUFValueType.UINT32)},
        tensors={"cls.weight": weight, "cls.bias": np.array([0.1], np.float32)},
    )
    with Llama(path) as llama:
        scores = llama.rerank("who eats crabs?", PAIRS["documents"])
        pairs = PairTemplate(llama.model, "who eats crabs?").tokenization(limit=512)
        ids = [pairs.tokenize(document) for document in PAIRS["documents"]]
    rows = load("tiny-jina-v2", PoolingType.CLS).embed_texts(ids, normalize=False)
    np.testing.assert_allclose(scores, np.tanh(rows @ weight[0] + 0.1), atol=5e-3)
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", [1, 2, 3]])
@pytest.mark.parametrize("name", RERANKERS)
def test_a_query_or_document_that_is_no_text_is_refused(load, name, wrong):
    kind = type(wrong).__name__
    with pytest.raises(errors.InputError, match=f"the query is {kind}, not str"):
        load(name).rerank(wrong, ["document"])
    with pytest.raises(errors.InputError, match=f"text 1 is ({kind}, not str|missing)"):
        load(name).rerank("query", ["document", wrong])


QUERY, DOCUMENTS = PAIRS["queries"][0], PAIRS["documents"]
CASES = [(query, document) for document in DOCUMENTS for query in PAIRS["queries"]]
# How far a score may move with its pack: flash attention works in half precision, and these models
# have large weights.
DRIFT = 0.03


@pytest.mark.parametrize("name", RERANKERS)
def test_top_k_gives_the_best_best_first(load, name):
    llama = load(name)
    scores = llama.rerank(QUERY, DOCUMENTS)
    results = llama.rerank(QUERY, DOCUMENTS, top_k=3)
    assert [result.score for result in results] == sorted((r.score for r in results), reverse=True)
    others = np.delete(scores, [result.index for result in results])
    assert (len(others), len(results)) == (len(scores) - 3, 3)
    assert results[-1].score >= others.max() - DRIFT
    for result in results:
        assert result == RerankResult(result.index, result.score)
        assert type(result.score) is float
        assert result.score == pytest.approx(scores[result.index], abs=DRIFT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        results[0].score = 1.0


def test_return_documents_gives_all_of_them_sorted(load):
    results = load("tiny-bert-rank").rerank(QUERY, iter(DOCUMENTS), return_documents=True)
    assert sorted(result.index for result in results) == list(range(len(DOCUMENTS)))
    assert all(result.document == DOCUMENTS[result.index] for result in results)
    scores = [result.score for result in results]
    assert scores == sorted(scores, reverse=True)
    best = load("tiny-bert-rank").rerank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
    assert [result.document for result in best] == [DOCUMENTS[result.index] for result in best]


def test_equal_documents_keep_their_order_and_more_than_there_are_is_all(load):
    results = load("tiny-bert-rank").rerank(QUERY, ["a crab"] * 5, top_k=99)
    assert [result.index for result in results] == [0, 1, 2, 3, 4]
    assert load("tiny-bert-rank").rerank(QUERY, [], top_k=1) == []
    assert load("tiny-bert-rank").rerank(QUERY, []).shape == (0,)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", [1]])
def test_a_top_k_that_is_no_count_is_refused(load, wrong):
    with pytest.raises(errors.InputError, match="top_k must be a positive integer"):
        load("tiny-bert-rank").rerank(QUERY, DOCUMENTS, top_k=wrong)
    assert len(load("tiny-bert-rank").rerank(QUERY, DOCUMENTS, top_k=np.int64(2))) == 2


@pytest.mark.parametrize("wrong", ["relu", None, 1, ["sigmoid"]])
def test_an_unknown_activation_is_refused(load, wrong):
    with pytest.raises(errors.InputError, match="activation must be"):
        load("tiny-bert-rank").rerank(QUERY, DOCUMENTS, activation=wrong)


@pytest.mark.parametrize("name", RERANKERS)
def test_pairs_get_the_scores_of_their_queries(load, name):
    llama = load(name)
    scores = llama.rerank_pairs(CASES)
    assert scores.shape == (len(CASES),)
    by_query = [llama.rerank(query, DOCUMENTS) for query in PAIRS["queries"]]
    np.testing.assert_allclose(scores, np.stack(by_query, axis=1).ravel(), atol=DRIFT)
    np.testing.assert_allclose(
        llama.rerank_pairs(iter(CASES), activation="sigmoid"),
        np.stack(
            [llama.rerank(q, DOCUMENTS, activation="sigmoid") for q in PAIRS["queries"]], 1
        ).ravel(),
        atol=DRIFT,
    )


def test_packs_mix_queries_and_a_query_is_encoded_once(monkeypatch):
    made = []
    init = PairTemplate.__init__
    monkeypatch.setattr(
        PairTemplate, "__init__", lambda self, *a: (made.append(a[1]), init(self, *a))[1]
    )
    with Llama(gguf_path("tiny-bert-rank"), n_contexts=1, n_threads=1, pack_tokens=128) as llama:
        llama.rerank_pairs([(f"query {i % 7}", f"document {i}") for i in range(700)])
        assert sorted(made) == [f"query {i}" for i in range(7)]
        assert sum(worker["packs"] for worker in llama.stats()["workers"]) < 200


def test_many_pairs_keep_their_order(load):
    llama = load("tiny-bert-rank")
    pairs = [CASES[i % len(CASES)] for i in range(1500)]
    want = np.resize(llama.rerank_pairs(CASES), 1500)
    np.testing.assert_allclose(llama.rerank_pairs(pairs), want, atol=DRIFT)
    np.testing.assert_allclose(asyncio.run(llama.arerank_pairs(pairs)), want, atol=DRIFT)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("ab", r"pair 1 is not a \(query, document\): 'ab'"),
        (("q",), "pair 1 is not a"),
        (("q", "d", "x"), "pair 1 is not a"),
        (3, "pair 1 is not a"),
        (None, "pair 1 is not a"),
        ((3, "d"), "the query of pair 1 is int, not str"),
        (([], "d"), "the query of pair 1 is list, not str"),
        (("q", None), "text 1 is missing"),
        (("q", "long " * 500), "text 1 has"),
        (("crab " * 500, "d"), "text 1"),
    ],
)
def test_a_wrong_pair_is_named(load, wrong, message):
    llama = load("tiny-bert-rank")
    for pairs in ([("q", "d"), wrong], [("q", "d"), wrong, *CASES * 5]):
        with pytest.raises(errors.InputError, match=message):
            llama.rerank_pairs(pairs)
        with pytest.raises(errors.InputError, match=message):
            asyncio.run(llama.arerank_pairs(pairs))


def test_one_pair_instead_of_a_list_is_refused(load):
    with pytest.raises(errors.InputError, match="takes a list"):
        load("tiny-bert-rank").rerank_pairs("query")
    with pytest.raises(errors.InputError, match="pair 0"):
        load("tiny-bert-rank").rerank_pairs(("query", "document"))


def test_pairs_that_are_too_long_are_cut_like_documents(load):
    llama = load("tiny-bert-rank")
    long = " ".join(f"w{i}" for i in range(500))
    for side in ("end", "start", "middle"):
        np.testing.assert_allclose(
            llama.rerank_pairs([(QUERY, long)], truncate=side),
            llama.rerank(QUERY, [long], truncate=side),
            atol=DRIFT,
        )


def test_awaited_results_are_those_of_rerank(load):
    llama = load("tiny-bert-rank")

    async def ask():
        return (
            await llama.arerank(QUERY, DOCUMENTS, activation="sigmoid"),
            await llama.arerank(QUERY, DOCUMENTS * 10, top_k=3, return_documents=True),
            await llama.arerank_pairs(CASES),
        )

    scores, best, pairs = asyncio.run(ask())
    np.testing.assert_allclose(
        scores, llama.rerank(QUERY, DOCUMENTS, activation="sigmoid"), atol=DRIFT
    )
    assert [result.document for result in best] == [best[0].document] * 3
    np.testing.assert_allclose(pairs, llama.rerank_pairs(CASES), atol=DRIFT)


def test_an_embedder_does_not_rerank(load):
    for call in (
        lambda: load("tiny-bert").rerank("q", ["d"], activation="softmax"),
        lambda: load("tiny-bert").rerank_pairs([("q", "d")]),
        lambda: asyncio.run(load("tiny-bert").arerank("q", ["d"], top_k=1)),
        lambda: asyncio.run(load("tiny-bert").arerank_pairs([("q", "d")])),
    ):
        with pytest.raises(errors.PoolingError, match="no classification head"):
            call()


def test_a_reranker_does_not_embed(load):
    for call in (
        lambda: load("tiny-bert-rank").embed("a crab"),
        lambda: load("tiny-bert-rank").embed_texts(["a crab"]),
        lambda: next(load("tiny-bert-rank").embed_iter(["a crab"])),
        lambda: load("tiny-bert-rank").submit("a crab"),
    ):
        with pytest.raises(errors.PoolingError, match=r"use rerank\(\)"):
            call()


def test_a_score_that_is_not_finite_raises_with_its_index():
    with Llama(gguf_path("tiny-bert-rank"), n_contexts=1, n_threads=1, deterministic=True) as llama:
        for call in (
            lambda: llama.rerank(QUERY, DOCUMENTS[:3]),
            lambda: llama.rerank(QUERY, DOCUMENTS[:3], top_k=1),
            lambda: llama.rerank_pairs(CASES[:3]),
        ):
            llama._scheduler._inject("not_finite", times=1)
            with pytest.raises(errors.NumericalError) as info:
                call()
            assert info.value.index in range(3)
            call()
