"""Scores are those of the definitions, and a search by blocks is a search of everything."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from helpers import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacrab import similarity
from llamacrab.errors import InputError
from llamacrab.similarity import semantic_search, semantic_search_binary

SCORES = ("cosine", "dot", "euclidean")


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)


def brute_force(queries, corpus, score):
    """Return all scores by the definitions, in double precision."""
    a, b = np.atleast_2d(queries).astype(np.float64), corpus.astype(np.float64)
    if score == "euclidean":
        return -np.linalg.norm(a[:, None] - b[None], axis=2)
    if score == "cosine":
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


# ------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_definition(vectors, score):
    a, b = vectors[:3], vectors[3:50]
    options = {"normalized": False} if score == "dot" else {}
    name = {"cosine": "cos_sim", "dot": "dot_score", "euclidean": "euclidean_sim"}[score]
    want = brute_force(a, b, score)
    found = getattr(similarity, name)(a, b, **options)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=2e-6)
    found = getattr(similarity, f"pairwise_{name}")(a, b[:3], **options)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.diag(want), atol=2e-6)


@pytest.mark.parametrize("name", ["cos_sim", "dot_score", "euclidean_sim"])
@pytest.mark.parametrize("prefix", ["", "pairwise_"])
def test_scores_are_those_of_sentence_transformers(name, prefix):
    golden = json.loads((DATA / "similarity.json").read_text(encoding="utf-8"))
    a, b = (np.array(golden[rows], dtype=np.float32) for rows in "ab")
    options = {"normalized": False} if name == "dot_score" else {}
    found = getattr(similarity, prefix + name)(a, b, **options)
    np.testing.assert_allclose(found, golden[prefix + name], rtol=1e-5, atol=1e-6)


def test_near_rows_have_their_distance_and_not_that_of_rounding():
    row = np.full(384, 10, dtype=np.float32)
    near = row.copy()
    near[0] += 1e-3
    assert similarity.euclidean_sim(row, near)[0, 0] == pytest.approx(-1e-3, rel=1e-3)
    assert similarity.euclidean_sim(row, row)[0, 0] == 0


def test_normalizing_gives_rows_of_length_one_and_leaves_zeros(vectors):
    vectors[5] = 0
    rows = similarity.normalize(vectors)
    norms = np.linalg.norm(rows, axis=1)
    assert norms[5] == 0
    np.testing.assert_allclose(np.delete(norms, 5), 1, atol=1e-6)
    assert similarity.normalize(vectors, out=vectors) is vectors
    np.testing.assert_array_equal(vectors, rows)
    assert similarity.normalize(vectors[1]).shape == (16,)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint64, np.float16, np.float32, np.float64])
def test_vectors_of_any_number_are_compared(kind):
    vectors = np.array([[100, 0], [100, 100], [0, 7]], dtype=kind)
    scores, indices = semantic_search(vectors[0], vectors, top_k=3)
    np.testing.assert_array_equal(indices, [[0, 1, 2]])
    np.testing.assert_allclose(scores, [[1, 0.5**0.5, 0]], atol=1e-6)


def test_numbers_near_the_ends_of_float32_are_compared():
    vectors = np.array([[1e30, 0], [1e-30, 1e-30], [0, 3e38]], dtype=np.float32)
    np.testing.assert_allclose(
        similarity.cos_sim(vectors[0], vectors), [[1, 0.5**0.5, 0]], atol=1e-6
    )


# ------------------------------------------------------------------------------- searching


@st.composite
def searches(draw):
    """Draw vectors of few small integers, so that there are ties, and they are exact."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_embd = draw(st.integers(1, 6))
    corpus = rng.integers(-2, 3, size=(draw(st.integers(0, 60)), n_embd))
    queries = rng.integers(-2, 3, size=(draw(st.integers(1, 8)), n_embd))
    kind = draw(st.sampled_from(["float32", "float16", "int8", "float64"]))
    sizes = {name: draw(st.integers(1, 70)) for name in ("top_k", "query_block", "corpus_block")}
    return queries.astype(kind), corpus.astype(kind), sizes


def as_blocks(corpus, size):
    return (corpus[i : i + size] for i in range(0, len(corpus), size))


@settings(max_examples=300, deadline=None)
@given(searches(), st.sampled_from(["dot", "euclidean"]), st.integers(1, 70))
def test_the_blocks_find_what_brute_force_finds_and_the_first_of_equals(search, score, size):
    queries, corpus, sizes = search
    every = brute_force(queries, corpus, score)
    # A stable sort leaves the lower index first.
    want = np.argsort(-every, axis=1, kind="stable")[:, : sizes["top_k"]]
    for given_as in (corpus, corpus.tolist(), as_blocks(corpus, size)):
        scores, indices = semantic_search(queries, given_as, score=score, normalized=False, **sizes)
        assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(indices, want)
        np.testing.assert_allclose(scores, np.take_along_axis(every, want, 1), rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(searches())
def test_the_blocks_find_what_brute_force_finds_by_cosine(search):
    queries, corpus, sizes = search
    queries, corpus = (rows[rows.any(axis=1)] for rows in (queries, corpus))
    every = brute_force(queries, corpus, "cosine")
    scores, indices = semantic_search(queries, corpus, **sizes)
    # The last bits of a cosine depend on its block, so that rows in one direction may swap.
    want = -np.sort(-every, axis=1)[:, : sizes["top_k"]]
    if len(queries):
        np.testing.assert_allclose(scores, want, atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(every, indices, 1), want, atol=1e-6)
        assert all(len(set(row)) == len(row) for row in indices.tolist())


@pytest.mark.parametrize("block", [1, 7, 500, 10_000])
@pytest.mark.parametrize("top_k", [1, 10, 1000])
def test_the_nearest_rows_are_found_whatever_the_blocks(vectors, block, top_k):
    scores, indices = semantic_search(vectors[:4], vectors, top_k=top_k, corpus_block=block)
    every = brute_force(vectors[:4], vectors, "cosine")
    want = np.argsort(-every, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_allclose(scores, np.take_along_axis(every, want, axis=1), atol=1e-6)


def test_a_mapped_corpus_is_searched_in_bounded_memory(tmp_path):
    rng = np.random.default_rng(0)
    corpus = np.lib.format.open_memmap(
        tmp_path / "corpus.npy", "w+", dtype=np.float16, shape=(200_000, 64)
    )
    corpus[:] = rng.normal(size=corpus.shape)
    queries = np.asarray(corpus[[5, 150_000]], dtype=np.float32)
    tracemalloc.start()
    scores, indices = semantic_search(queries, corpus, top_k=5, corpus_block=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert indices[:, 0].tolist() == [5, 150_000]
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    assert peak < 4e6, "a block is 2000 x 64 x 4 bytes = 0.5 MB, the corpus would be 51 MB"


def test_a_stream_of_vectors_is_searched_as_it_comes(load):
    texts = [f"crab number {i}" for i in range(40)]
    llama = load("tiny-bert")
    stream = llama.embed_iter(texts, batch_size=7)
    _, indices = semantic_search(llama.embed(texts[23]), stream, top_k=1)
    assert indices.tolist() == [[23]]


# ------------------------------------------------------------------------------- binary


@pytest.mark.parametrize("kind", ["ubinary", "binary"])
@pytest.mark.parametrize("n_embd", [16, 20, 128])
@pytest.mark.parametrize("has_bitwise_count", [True, False])
def test_a_binary_search_is_by_bits_then_by_dot_products(
    kind, n_embd, has_bitwise_count, monkeypatch
):
    if not has_bitwise_count:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    vectors = np.random.default_rng(1).normal(size=(300, n_embd)).astype(np.float32)
    bits = np.packbits(vectors > 0, axis=1)
    packed = bits if kind == "ubinary" else (bits.astype(int) - 128).astype(np.int8)
    queries = vectors[:3]
    differ = ((queries > 0)[:, None] != (vectors > 0)[None]).sum(axis=2)
    nearest = np.argsort(differ, axis=1, kind="stable")
    for block in (11, 1000):
        scores, indices = semantic_search_binary(
            queries, packed, top_k=4, rescore=False, corpus_block=block
        )
        np.testing.assert_array_equal(indices, nearest[:, :4])
        np.testing.assert_array_equal(-scores, np.take_along_axis(differ, nearest, 1)[:, :4])
        scores, indices = semantic_search_binary(
            queries, as_blocks(packed, 50), top_k=4, rescore_multiplier=5, corpus_block=block
        )
        for query, candidates, row, values in zip(
            queries, nearest[:, :20], indices, scores, strict=True
        ):
            again = (vectors[candidates] > 0) @ query
            best = np.argsort(-again, kind="stable")[:4]
            assert set(row) == set(candidates[best])
            np.testing.assert_allclose(values, again[best], atol=1e-5)


def test_a_binary_corpus_of_another_width_is_refused(vectors):
    with pytest.raises(
        InputError, match=r"queries of 16 values has rows of 2 bytes .* not of 3 uint8"
    ):
        semantic_search_binary(vectors[0], np.zeros((5, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="not of 2 float32"):
        semantic_search_binary(vectors[0], np.zeros((5, 2), dtype=np.float32))


# ------------------------------------------------------------------------------- refused


def test_unnormalised_rows_are_not_compared_by_dot_unless_asked(vectors):
    """The pitfall: of two vectors the longer one wins, whatever it means."""
    with pytest.raises(InputError, match=r"row 0 of the queries has length \d.*normalize\(\)"):
        semantic_search(vectors[:2], vectors, score="dot")
    unit = similarity.normalize(vectors)
    unit[321] *= 1.5
    with pytest.raises(InputError, match=r"row 321 of the corpus has length 1\.5"):
        semantic_search(unit[:2], unit, score="dot", corpus_block=100)
    with pytest.raises(InputError, match="row 1 of b has length 2"):
        similarity.dot_score(unit[:2], unit[:2] * [[1], [2]])
    found, _ = semantic_search(unit[:2], unit, score="dot", normalized=False)
    np.testing.assert_allclose(found[:, 0], brute_force(unit[:2], unit, "dot").max(1), atol=1e-6)
    half = similarity.normalize(vectors).astype(np.float16)
    assert similarity.dot_score(half, half).shape == (500, 500)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("score", SCORES)
def test_rows_that_are_not_finite_are_named(vectors, bad, score):
    vectors[321, 3] = bad
    with pytest.raises(InputError, match="row 321 of the corpus holds NaN, infinity"):
        semantic_search(vectors[0], vectors, score=score, normalized=False, corpus_block=100)
    with pytest.raises(InputError, match="row 1 of the queries holds NaN"):
        semantic_search(vectors[320:], vectors[:9], score=score, normalized=False)
    with pytest.raises(InputError, match="row 321 of b holds NaN"):
        similarity.cos_sim(vectors[:2], vectors)


def test_a_row_of_zeros_has_no_cosine_but_a_distance(vectors):
    vectors[7] = 0
    with pytest.raises(InputError, match="row 7 of the corpus is all zeros"):
        semantic_search(vectors[0], vectors)
    with pytest.raises(InputError, match="row 7 of a is all zeros"):
        similarity.pairwise_cos_sim(vectors, vectors)
    with pytest.raises(InputError, match="row 0 of b has length 0"):
        similarity.dot_score(vectors[:1] / np.linalg.norm(vectors[0]), vectors[7:8].repeat(8, 0))
    assert semantic_search(vectors[7], vectors, score="euclidean")[1][0, 0] == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: semantic_search(v[:2, :8], v), "vectors of 8 and of 16 values"),
        (lambda v: similarity.cos_sim(v[:2, :8], v), "vectors of 8 and of 16 values"),
        (lambda v: similarity.pairwise_cos_sim(v[:2], v), "a has 2 rows, b has 500"),
        (lambda v: semantic_search(v[0], v[0]), r"the corpus must have shape .*, not \(16,\)"),
        (lambda v: semantic_search(v[0], v[None]), r"the corpus must have .* not \(1, 500, 16\)"),
        (lambda v: semantic_search(v[None], v), r"the queries must have .* not \(1, 500, 16\)"),
        (lambda v: semantic_search(v[:, :0], v), r"the queries must have .* not \(500, 0\)"),
        (lambda v: semantic_search(["text"], v), "the queries must be a matrix of numbers"),
        (lambda v: semantic_search(v[0], ["text"]), "the corpus must be a matrix of numbers"),
        (lambda v: semantic_search([[1], [2, 3]], v), "the queries must be a matrix of numbers"),
        (lambda v: semantic_search(v[0], v.astype(object)), "matrix of numbers, not of object"),
        (lambda v: semantic_search(v[0], v.astype(complex)), "matrix of numbers, not of complex"),
        (lambda v: semantic_search(v[0], v, score="cos"), "score must be 'cosine', 'dot' or"),
        (lambda v: semantic_search(v[0], v, top_k=0), "top_k must be an integer of at least 1"),
        (lambda v: semantic_search(v[0], v, top_k=1.5), "top_k must be an integer"),
        (lambda v: semantic_search(v[0], v, corpus_block=-1), "corpus_block must be an integer"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_numbers(vectors, call, message):
    with pytest.raises(InputError, match=message):
        call(vectors)


def test_an_empty_corpus_and_no_queries_give_nothing(vectors):
    for nothing in ([], vectors[:0], iter([])):
        scores, indices = semantic_search(vectors[:3], nothing)
        assert scores.shape == indices.shape == (3, 0)
    scores, indices = semantic_search(vectors[:0], vectors)
    assert scores.shape == indices.shape == (0, 10)
