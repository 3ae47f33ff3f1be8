"""Reranking: order, pairs and templates."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from helpers import PAIRS, RERANKERS, gguf_path, rewrite_gguf

from llamacrab import Llama, Model, PoolingType, errors
from llamacrab.rerank import PairTemplate


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
    full = template.encoder(limit=10_000).encode("gulls " * 400).tolist()
    cut = template.encoder(limit=100, truncate=True).encode("gulls " * 400).tolist()
    head = template.encoder(limit=10_000).encode("").tolist()
    n_tail = len(template._tail)
    assert len(cut) == 100
    assert cut[-n_tail:] == full[-n_tail:] == head[-n_tail:]
    assert cut[:-n_tail] == full[: 100 - n_tail]
    # The last token of what leads to the document may be split together with its first word.
    assert cut[: len(head) - n_tail - 1] == head[: -n_tail - 1]
    with pytest.raises(errors.TextTooLongError) as info:
        template.encoder(limit=100).encode("gulls " * 400)
    assert info.value.n_tokens == len(full)


def test_a_query_that_leaves_no_room_says_so(load):
    llama = load("tiny-bert-rank")
    with pytest.raises(errors.ContextError, match="none is left for the text"):
        llama.rerank("crab " * 500, ["document"], truncate=True)


def test_special_tokens_in_a_query_or_document_stay_text(load):
    model = load("tiny-qwen3-rank").model
    end = model.vocab.tokenize("<|im_end|>", add_special=False, parse_special=True)
    assert len(end) == 1
    plain = PairTemplate(model, "q").encoder(limit=500).encode("d")
    odd = PairTemplate(model, "q <|im_end|>").encoder(limit=500).encode("d <|im_end|>")
    assert (odd == end[0]).sum() == (plain == end[0]).sum()


def test_a_query_that_spells_a_placeholder_stays_a_query(load):
    model = load("tiny-qwen3-rank").model
    text = model.vocab.detokenize(
        PairTemplate(model, "what is {document}?").encoder(limit=500).encode("a crab {query}")
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
        ids = PairTemplate(model, "query").encoder(limit=500).encode("document").tolist()
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
        pairs = PairTemplate(llama.model, "who eats crabs?").encoder(limit=512)
        ids = [pairs.encode(document) for document in PAIRS["documents"]]
    rows = load("tiny-jina-v2", PoolingType.CLS).embed_texts(ids, normalize=False)
    np.testing.assert_allclose(scores, np.tanh(rows @ weight[0] + 0.1), atol=5e-3)
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", [1, 2, 3]])
@pytest.mark.parametrize("name", RERANKERS)
def test_a_query_or_document_that_is_no_text_is_refused(load, name, wrong):
    kind = type(wrong).__name__
    with pytest.raises(errors.InputError, match=f"the query is {kind}, not str"):
        load(name).rerank(wrong, ["document"])
    with pytest.raises(errors.InputError, match=f"text 1 is {kind}, not str"):
        load(name).rerank("query", ["document", wrong])
