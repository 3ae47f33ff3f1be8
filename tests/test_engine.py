"""One way to run a call: whatever the way, the same rows, errors and partial results."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from helpers import DATA, TEXTS

from llamacrab import Llama, PoolingType, _engine, embed_corpus, errors, tuning

N = 60
BAD = 40


def embed_texts(llama, texts, **options):
    return llama.embed_texts(texts, **options)


def submit(llama, texts, **options):
    return llama.submit(texts, **options).result(timeout=60)


def aembed_texts(llama, texts, **options):
    return asyncio.run(llama.aembed_texts(texts, **options))


def embed_iter(llama, texts, **options):
    return np.concatenate(list(llama.embed_iter(texts, batch_size=len(texts), **options)))


WAYS = (embed_texts, submit, aembed_texts, embed_iter)
OPTIONS = {
    "plain": {"truncate": True},
    "chunk": {"chunk": 24, "chunk_overlap": 4},
    "float16": {"truncate": True, "dtype": "float16"},
    "binary": {"truncate": True, "dtype": "binary"},
    "chunk and binary": {"chunk": 24, "dtype": "ubinary"},
}


@pytest.fixture(scope="module")
def tiny():
    with Llama(DATA / "tiny-bert.gguf", n_contexts=2, n_threads=1, pack_tokens=192) as llama:
        yield llama


@pytest.fixture(scope="module", params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


@pytest.fixture(scope="module")
def expected(tiny, options):
    return tiny.embed_texts(TEXTS[:N], **options)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_embeddings(tiny, options, expected, way):
    rows = way(tiny, TEXTS[:N], **options)
    assert rows.dtype == expected.dtype
    assert rows.shape == expected.shape
    if rows.dtype.kind == "f":
        assert np.abs(rows - expected).max() < 1e-3
    else:  # a value next to zero may fall on either side
        assert np.mean(rows != expected) < 0.01


@pytest.mark.parametrize("way", WAYS)
def test_every_way_names_the_same_text_and_keeps_what_was_computed(tiny, options, expected, way):
    texts = [*TEXTS[:BAD], 7, *TEXTS[BAD + 1 : N]]
    with pytest.raises(errors.InputError, match=f"text {BAD} is int") as info:
        way(tiny, texts, **options)
    check_partial(info.value, expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_names_a_text_that_is_too_long(tiny, way):
    options = OPTIONS["plain"]
    texts = [*TEXTS[:BAD], "long " * 600, *TEXTS[BAD + 1 : N]]
    with pytest.raises(errors.TextTooLongError, match=f"text {BAD} has 60\\d tokens") as info:
        way(tiny, texts, **(options | {"truncate": False}))
    check_partial(info.value, tiny.embed_texts(TEXTS[:N], **options))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_names_a_text_whose_row_is_not_finite(tiny, options, expected, way):
    tiny._scheduler._inject("not_finite", times=10_000)
    try:
        with pytest.raises(errors.NumericalError, match=r"text \d+") as info:
            way(tiny, TEXTS[:N], **options)
    finally:
        tiny._scheduler._inject("none")
    assert f"text {info.value.index} " in str(info.value)
    assert 0 <= info.value.index < N
    assert not info.value.done[info.value.index]
    assert ("in one of its windows" in str(info.value)) == ("chunk" in options)
    check_shape(info.value, expected)


def check_shape(error, expected):
    assert error.rows.shape == expected.shape
    assert error.rows.dtype == expected.dtype
    assert error.done.shape == (len(expected),)
    assert error.done.dtype == bool


def check_partial(error, expected):
    assert error.index == BAD
    check_shape(error, expected)
    assert not error.done[BAD]
    done = np.flatnonzero(error.done)
    if expected.dtype.kind == "f" and len(done):
        assert np.abs(error.rows[done] - expected[done]).max() < 1e-3


def test_token_rows_that_were_computed_are_kept(load):
    llama = load("tiny-bert", PoolingType.NONE)
    with pytest.raises(errors.InputError, match="text 2 is int") as info:
        llama.embed_texts([*TEXTS[:2], 7])
    assert [row.shape[1] for row in info.value.rows] == [llama.n_embd] * 3
    assert len(info.value.rows[2]) == 0


def test_a_stream_gives_what_comes_before_a_failure_and_counts_from_its_beginning(tiny):
    texts = [*TEXTS[:40], "long " * 600, *TEXTS[:40]]
    stream = tiny.embed_iter(texts, batch_size=16)
    assert [len(next(stream)) for _ in range(2)] == [16, 16]
    with pytest.raises(errors.TextTooLongError, match="text 40 has") as info:
        next(stream)
    assert info.value.index == 40
    assert info.value.rows.shape == (16, tiny.n_embd)


def test_a_stream_whose_source_fails_gives_what_came_before(tiny):
    def source():
        yield from TEXTS[:20]
        raise OSError("the disk is gone")

    stream = tiny.embed_iter(source(), batch_size=8, truncate=True)
    assert [len(next(stream)) for _ in range(2)] == [8, 8]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_scores_that_were_computed_are_kept(load):
    llama = load("tiny-bert-rank")
    documents = TEXTS[:20]
    with pytest.raises(errors.InputError, match="text 20 is int") as info:
        llama.rerank("who eats crabs?", [*documents, 7], truncate=True)
    assert info.value.rows.shape == (21,)
    assert not info.value.done[20]


@pytest.mark.parametrize("way", ["embed_texts", "embed_iter", "aembed_texts", "embed_corpus"])
def test_a_long_run_finds_the_size_of_its_packs(way, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning.Calibration, "PACKS_EACH", 1)
    monkeypatch.setattr(_engine, "TEXTS_PER_STEP", 32)
    texts = [f"crab number {i} walks sideways" for i in range(5000)]
    # A short queue: the calibration goes on as texts are queued.
    with Llama(DATA / "tiny-bert.gguf", n_cpus=1, queue_tokens=2048) as llama:
        if way == "embed_texts":
            llama.embed_texts(texts)
        elif way == "embed_iter":
            assert sum(map(len, llama.embed_iter(texts, batch_size=512))) == len(texts)
        elif way == "aembed_texts":
            asyncio.run(llama.aembed_texts(texts))
        else:
            embed_corpus(texts, tmp_path / "out", llama)
        assert tuning.remembered(llama.model, False) is not None
        assert llama._scheduler.pack_tokens == llama.layout.pack_tokens


@pytest.mark.parametrize("name", ["mean", "MEAN", "Mean", PoolingType.MEAN])
def test_a_pooling_may_be_given_by_name(name):
    with Llama(DATA / "tiny-bert.gguf", pooling_type=name) as llama:
        assert llama.pooling_type is PoolingType.MEAN


@pytest.mark.parametrize("wrong", ["average", 9, None, ""])
def test_a_wrong_pooling_is_refused_with_the_choices(wrong):
    with pytest.raises(errors.PoolingError, match="'mean', 'cls', 'last', 'rank'"):
        Llama(DATA / "tiny-bert.gguf", pooling_type=wrong)


def test_queries_and_documents_take_what_other_calls_take(tiny, capsys):
    texts = TEXTS[:8]
    query = tiny.embed_query(texts[0], truncate=True, timeout=60)
    documents = tiny.embed_documents(texts, truncate=True, timeout=60, progress=True, dedup=False)
    assert "8/8" in capsys.readouterr().err
    with pytest.raises(errors.LlamaTimeoutError):
        tiny.embed_documents(TEXTS, truncate=True, timeout=0)
    ahead = tiny.submit(TEXTS * 20, truncate=True, dedup=False)  # one text alone may be in time
    with pytest.raises(errors.LlamaTimeoutError):
        tiny.embed_query(texts[0], truncate=True, timeout=0)
    ahead.cancel()

    async def both():
        return (
            await tiny.aembed_query(texts[0], truncate=True),
            await tiny.aembed_documents(iter(texts), truncate=True),
        )

    awaited_query, awaited_documents = asyncio.run(both())
    np.testing.assert_allclose(awaited_query, query, atol=1e-3)
    np.testing.assert_allclose(awaited_documents, documents, atol=1e-3)


def test_queries_and_documents_get_their_prompts_however_they_are_embedded(load, monkeypatch):
    llama = load("tiny-bert")
    monkeypatch.setattr(llama, "prompts", {"query": "ask: ", "document": "read: "})
    monkeypatch.setattr(llama, "_pipelines", {})
    text = "who eats crabs"
    for got, whole in (
        (llama.embed_query(text), "ask: " + text),
        (asyncio.run(llama.aembed_query(text)), "ask: " + text),
        (llama.embed_documents([text])[0], "read: " + text),
        (asyncio.run(llama.aembed_documents([text]))[0], "read: " + text),
    ):
        np.testing.assert_allclose(got, llama.embed(whole), atol=1e-3)


def test_a_future_of_a_reranking_gives_what_the_call_gives():
    query, documents = "who eats crabs?", TEXTS[:12]
    # Else scores differ a little with what shares a pack, and documents may change places.
    with Llama(DATA / "tiny-bert-rank.gguf", deterministic=True) as llama:
        scores = llama.submit_rerank(query, documents, truncate=True).result(timeout=60)
        again = llama.rerank(query, documents, truncate=True)
        best = llama.submit_rerank(
            query, iter(documents), top_k=3, return_documents=True, truncate=True
        ).result(timeout=60)
    np.testing.assert_allclose(scores, again, atol=5e-3)
    assert [one.index for one in best] == np.argsort(-scores, kind="stable")[:3].tolist()
    assert [one.document for one in best] == [documents[one.index] for one in best]
