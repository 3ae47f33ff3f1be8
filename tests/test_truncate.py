"""Texts that are too long: what is cut, and what stays."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import EMBEDDERS, RERANKERS, TEXTS, cosines
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacrab import EmbedOptions, errors
from llamacrab._core import Tokenization
from llamacrab.requests.pair_template import PairTemplate

SIDES = ("end", "start", "middle")
LONG = " ".join(TEXTS[:30])


def kept(ids, room, side):
    """Return what the rule leaves of a list."""
    first = {"end": room, "start": 0, "middle": room - room // 2}[side]
    return [*ids[:first], *ids[len(ids) - (room - first) :]]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", EMBEDDERS)
def test_special_tokens_stay_and_the_text_is_cut_by_the_rule(load, name, side):
    vocab = load(name).model.vocab
    plain = vocab.tokenize(LONG, add_special=False).tolist()
    for limit in (9, 10, 57):
        room = limit - len(vocab.prefix_ids) - len(vocab.suffix_ids)
        want = [*vocab.prefix_ids, *kept(plain, room, side), *vocab.suffix_ids]
        encoder = Tokenization(vocab, limit=limit, truncate=side)
        assert encoder.tokenize(LONG).tolist() == want
        assert encoder.tokenize(vocab.tokenize(LONG)).tolist() == want


@pytest.mark.parametrize("side", SIDES)
def test_ids_without_special_tokens_are_cut_as_they_are(load, side):
    vocab = load("tiny-bert").model.vocab
    ids = list(range(30, 130))
    assert Tokenization(vocab, limit=7, truncate=side).tokenize(ids).tolist() == kept(ids, 7, side)


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(0, 60),
    limit=st.integers(1, 30),
    side=st.sampled_from(SIDES),
    opened=st.booleans(),
    closed=st.booleans(),
)
def test_cut_ids_fill_the_limit_and_keep_their_order(load, n, limit, side, opened, closed):
    vocab = load("tiny-bert").model.vocab
    ids = [*vocab.prefix_ids * opened, *range(30, 30 + n), *vocab.suffix_ids * closed]
    if not ids:
        return
    got = Tokenization(vocab, limit=limit, truncate=side).tokenize(ids).tolist()
    assert len(got) == min(limit, len(ids))
    places = [ids.index(token) for token in got]
    assert places == sorted(places)
    if limit > 2:
        assert (got[0] == vocab.bos) == opened or n == 0
        assert (got[-1] == vocab.sep) == closed or n == 0


def test_true_means_the_end(load):
    vocab = load("tiny-bert").model.vocab
    by_true, by_name = (
        Tokenization(vocab, limit=9, truncate=way).tokenize(LONG) for way in (True, "end")
    )
    np.testing.assert_array_equal(by_true, by_name)


@pytest.mark.parametrize("side", SIDES)
def test_every_way_to_embed_takes_the_side(load, side):
    llama = load("tiny-bert")
    vocab = llama.model.vocab
    want = llama.embed(Tokenization(vocab, limit=llama.n_ctx, truncate=side).tokenize(LONG))
    options = EmbedOptions(truncate=side)
    for row in (
        llama.embed(LONG, truncate=side),
        llama.embed_texts([LONG, "short"], options=options)[0],
        next(llama.embed_iter([LONG], truncate=side))[0],
        llama.submit(LONG, truncate=side).result(timeout=60),
        llama.embed(vocab.tokenize(LONG), truncate=side),
    ):
        assert cosines(row, want) > 0.9999


@pytest.mark.parametrize("wrong", ["left", "", 2, None, b"end", ["end"]])
def test_an_unknown_side_is_refused(load, wrong):
    with pytest.raises(errors.InputError, match="truncate must be"):
        Tokenization(load("tiny-bert").model.vocab, limit=9, truncate=wrong)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", RERANKERS)
def test_of_a_pair_only_the_document_is_cut(load, name, side):
    model = load(name).model
    template = PairTemplate(model, "who eats crabs?")
    document = " ".join(f"w{i}" for i in range(300))
    whole = template.tokenization(limit=10_000).tokenize(document).tolist()
    bare = template.tokenization(limit=10_000).tokenize("").tolist()
    for limit in (len(bare) + 20, len(bare) + 21):
        cut = template.tokenization(limit=limit, truncate=side).tokenize(document).tolist()
        assert len(cut) == limit
        n_tail = len(template._suffix_ids)
        assert cut[limit - n_tail :] == bare[len(bare) - n_tail :]
        # What leads to the document may be split together with its first word.
        n_head = len(bare) - n_tail - 1
        assert cut[: len(template._prefix_ids)] == bare[: len(template._prefix_ids)]
        if side != "start":
            assert cut[:n_head] == whole[:n_head]
        text = model.vocab.detokenize(cut)
        assert ("w299" in text) == (side != "end")
        assert bool(re.search(r"w ?0\b", text)) == (side != "start")
