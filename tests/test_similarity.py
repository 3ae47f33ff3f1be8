"""Cosines and nearest rows are those of plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from llamacrab import similarity


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)


def test_cosines_are_those_of_the_definition(vectors):
    found = similarity.cos_sim(vectors[:3], vectors)
    for i in range(3):
        a, b = vectors[i], vectors[7]
        want = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert found[i, 7] == pytest.approx(want, abs=1e-6)


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
    scores, indices = similarity.semantic_search(vectors[0], vectors, 3)
    np.testing.assert_array_equal(indices, [[0, 1, 2]])
    np.testing.assert_allclose(scores, [[1, 0.5**0.5, 0]], atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 500, 10_000])
@pytest.mark.parametrize("top_k", [1, 10, 1000])
def test_the_nearest_rows_are_found_whatever_the_blocks(vectors, block, top_k, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)
    scores, indices = similarity.semantic_search(vectors[:4], vectors, top_k)
    every = similarity.cos_sim(vectors[:4], vectors)
    want = np.argsort(-every, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_allclose(scores, np.take_along_axis(every, want, axis=1), atol=1e-6)


def test_no_neighbours_cannot_be_asked_for(vectors):
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        similarity.semantic_search(vectors[0], vectors, 0)
