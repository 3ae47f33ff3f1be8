"""What an option does to a vector, checked against others' code or by hand."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
from gguf import GGUFValueType
from helpers import EMBEDDERS, FAMILIES, TEXTS, cosines, gguf_path, golden, ragged, rewrite_gguf
from hypothesis import given
from hypothesis import strategies as st

from llamacrab import EmbedOptions, Llama, PoolingType
from llamacrab.errors import InputError, NumericalError, PoolingError, TextTooLongError
from llamacrab.quantize import calibrate, quantize
from llamacrab.requests.chunking import bounds
from llamacrab.requests.offsets import kept
from llamacrab.requests.prompts import prompts_of

DATA = golden("options")
SENTENCE = "A crab walks along the shore, sideways as crabs do."


# ------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(
    ("normalize", "norm"),
    [
        (True, lambda v: np.linalg.norm(v)),
        ("l2", lambda v: np.linalg.norm(v)),
        (2, lambda v: np.linalg.norm(v)),
        ("l1", lambda v: np.abs(v).sum()),
        (1, lambda v: np.abs(v).sum()),
        ("max", lambda v: np.abs(v).max()),
        (0, lambda v: np.abs(v).max() / 32760),
        (3, lambda v: (np.abs(v) ** 3).sum() ** (1 / 3)),
        (100, lambda v: np.linalg.norm(v.astype(np.float64), ord=100)),
        (False, lambda v: 1),
        ("none", lambda v: 1),
        (-1, lambda v: 1),
    ],
)
def test_a_vector_is_divided_by_the_norm_that_was_asked_for(load, normalize, norm):
    llama = load("tiny-bert")
    raw = llama.embed(SENTENCE, normalize=False)
    for rows in (
        llama.embed(SENTENCE, normalize=normalize),
        llama.embed(SENTENCE, normalize=normalize, chunk=True),
    ):
        np.testing.assert_allclose(rows, raw / norm(raw), rtol=1e-5)


@pytest.mark.parametrize("normalize", ["l7", -2, None.__class__, 1.5])
def test_a_norm_that_does_not_exist_is_refused(load, normalize):
    with pytest.raises(InputError, match="normalize must be"):
        load("tiny-bert").embed(SENTENCE, normalize=normalize)


def test_a_row_of_zeros_is_an_error_that_names_its_text(tmp_path):
    # Without its last norm's scale and shift, every row of this model is zero.
    with Llama(gguf_path("tiny-bert")) as llama:
        last = llama.model.n_layer - 1
    path = rewrite_gguf(
        gguf_path("tiny-bert"),
        tmp_path / "zero.gguf",
        tensors={
            f"blk.{last}.layer_output_norm.{part}": np.zeros(32, dtype=np.float32)
            for part in ("weight", "bias")
        },
    )
    with Llama(path) as llama, pytest.raises(NumericalError, match="text 0 is all zero") as info:
        llama.embed_texts([SENTENCE])
    assert info.value.index == 0


def test_mnf_31_dimensions_are_cut_before_the_norm_and_impossible_ones_refused(load):
    llama = load("tiny-bert")
    raw = llama.embed(SENTENCE, normalize=False)
    for chunk in (False, True):
        short = llama.embed(SENTENCE, dimensions=8, chunk=chunk)
        np.testing.assert_allclose(short, raw[:8] / np.linalg.norm(raw[:8]), rtol=1e-4)
    assert llama.embed_texts([SENTENCE] * 3, dimensions=8).shape == (3, 8)
    for wrong in (0, -1, 33, 1.5, "8"):
        with pytest.raises(InputError, match="dimensions="):
            llama.embed(SENTENCE, dimensions=wrong)
    with pytest.raises(InputError, match="12 is not a multiple of 8"):
        llama.embed(SENTENCE, dimensions=12, dtype="binary")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_quantized_vectors_equal_those_of_sentence_transformers(dtype):
    got = quantize(DATA["vectors"], dtype, ranges=calibrate(DATA["calibration"]))
    assert got.dtype == DATA[dtype].dtype
    # A value on the edge of a step may fall on either side of it.
    off = np.abs(got.astype(int) - DATA[dtype].astype(int))
    assert off.max() <= (1 if "int8" in dtype else 0)
    assert (off > 0).mean() < 0.01


def test_a_value_out_of_range_becomes_the_end_of_the_range():
    ranges = [[-1.0, -1.0], [1.0, 1.0]]
    assert quantize([[-9.0, 9.0]], "int8", ranges=ranges).tolist() == [[-128, 127]]
    assert quantize([[-9.0, 9.0]], "uint8", ranges=ranges).tolist() == [[0, 255]]


def test_every_way_in_gives_the_dtype_that_was_asked_for(load):
    llama = load("tiny-bert")
    ranges = calibrate(llama.embed_texts(TEXTS, truncate=True))
    options = EmbedOptions(dtype="int8", ranges=ranges, truncate=True)
    rows = llama.embed_texts(TEXTS, options=options)
    assert rows.dtype == np.int8
    assert np.abs(rows.astype(int)).max() > 100
    stream = np.concatenate(list(llama.embed_iter(TEXTS, options=options, batch_size=33)))
    for other in (stream, llama.submit(TEXTS, options=options).result(timeout=60)):
        assert np.abs(rows.astype(int) - other).max() <= 1
    assert llama.embed(TEXTS[0], options=options).shape == (32,)
    assert llama.embed(TEXTS[0], dtype="ubinary", truncate=True).shape == (4,)
    with pytest.raises(InputError, match="int8 needs ranges="):
        llama.embed(TEXTS[0], dtype="int8")
    with pytest.raises(InputError, match=r"shape \(2, 32\), not \(2, 3\)"):
        llama.embed(TEXTS[0], dtype="int8", ranges=np.zeros((2, 3)))


def test_options_that_differ_only_in_type_or_ranges_are_not_mixed_up(load):
    llama = load("tiny-bert")
    assert not np.allclose(llama.embed(SENTENCE, normalize=1), llama.embed(SENTENCE))
    assert not np.allclose(llama.embed(SENTENCE, start_token=1), llama.embed(SENTENCE))
    rows = [
        llama.embed(SENTENCE, dtype="uint8", ranges=[[-high] * 32, [high] * 32])
        for high in (1.0, 9.0)
    ]
    assert not np.array_equal(*rows)


# ------------------------------------------------------------------------------ what is around


def test_special_tokens_may_be_left_out_or_replaced(load):
    llama = load("tiny-bert")
    vocab = llama.model.vocab
    plain = vocab.tokenize(SENTENCE, add_special=False).tolist()
    for start, end in ((False, False), (True, False), (7, True), (9, 11)):
        head = {True: list(vocab.prefix_ids), False: []}.get(start, [start])
        tail = {True: list(vocab.suffix_ids), False: []}.get(end, [end])
        got = llama.embed(SENTENCE, start_token=start, end_token=end)
        assert float(got @ llama.embed(head + plain + tail)) > 0.9999
    with pytest.raises(InputError, match="end_token must be a bool or an id"):
        llama.embed(SENTENCE, end_token=len(vocab))


def test_a_prompt_is_put_before_every_text_and_never_cut(load):
    llama = load("tiny-bert")
    prompt = "query: "
    rows = llama.embed_texts(TEXTS[:20], prompt=prompt, truncate=True)
    want = llama.embed_texts([prompt + text for text in TEXTS[:20]], truncate=True)
    assert cosines(rows, want).min() > 0.9999
    long = " ".join(TEXTS)
    cut = llama.embed(long, prompt=prompt, truncate="start")
    assert float(cut @ llama.embed(prompt + long, truncate="start")) < 0.9999
    with pytest.raises(InputError, match="text 0 is list, not str"):
        llama.embed([1, 2, 3], prompt=prompt)
    with pytest.raises(InputError, match="not both"):
        llama.embed("x", prompt="a", prompt_name="b")


@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-xlmr", "tiny-qwen3", "tiny-gemma2"])
def test_special_tokens_in_a_prompt_are_read_and_in_a_text_are_not(load, name, chunk):
    llama = load(name)
    vocab = llama.model.vocab
    special = next(token for token in range(len(vocab)) if vocab.is_control(token))
    spelled = vocab.token_to_piece(special).decode()
    prompt = f"{spelled}find: {spelled}"
    text = f"a crab {spelled}"
    plain = vocab.tokenize(text, add_special=False)
    assert special not in plain
    lead = vocab.tokenize(prompt, add_special=False, parse_special=True)
    assert (lead == special).sum() == 2
    want = llama.embed([*vocab.prefix_ids, *lead, *plain, *vocab.suffix_ids])
    got = llama.embed(text, prompt=prompt, chunk=chunk)
    assert cosines(got, want) > 0.9999
    touching = llama.embed("crab", prompt=f"{spelled}find: the ", chunk=chunk)
    ids = vocab.tokenize("find: the crab", add_special=False)
    want = llama.embed([*vocab.prefix_ids, special, *ids, *vocab.suffix_ids])
    assert cosines(touching, want) > 0.9999


def test_places_of_tokens_are_those_in_the_text_after_a_prompt_with_special_tokens(load):
    llama = load("tiny-bert", PoolingType.NONE)
    found = llama.embed_tokens("the sea", prompt="[SEP] find: ")
    bare = llama.embed_tokens("the sea")
    n = len(bare.ids) - 1  # without CLS
    np.testing.assert_array_equal(found.ids[-n:], bare.ids[-n:])
    np.testing.assert_array_equal(found.offsets[-n:], bare.offsets[-n:])
    assert not found.offsets[:-n].any()


def named(tmp_path, name, **fields):
    values = {"general.name": name, **fields}
    return rewrite_gguf(
        gguf_path("tiny-bert"),
        tmp_path / "named.gguf",
        fields={key: (value, GGUFValueType.STRING) for key, value in values.items()},
    )


def test_mnf_32_a_known_family_has_its_prompts_and_only_when_asked(load, tmp_path):
    with Llama(named(tmp_path, "nomic-embed-text-v1.5")) as llama:
        assert llama.prompts["query"] == "search_query: "
        plain = llama.embed("crabs")
        query = llama.embed_query("crabs")
        assert float(query @ llama.embed("search_query: crabs")) > 0.9999
        assert float(query @ llama.embed("crabs", prompt_name="query")) > 0.9999
        assert float(plain @ query) < 0.999
        documents = llama.embed_documents(["crabs", "lobsters"])
        want = llama.embed_texts(["search_document: crabs", "search_document: lobsters"])
        assert cosines(documents, want).min() > 0.9999
        with pytest.raises(InputError, match="there is no prompt 'title'"):
            llama.embed("crabs", prompt_name="title")
        assert float(llama.embed_query("crabs", prompt="x: ") @ llama.embed("x: crabs")) > 0.9999
    unknown = load("tiny-bert")
    assert unknown.prompts == {}
    assert np.allclose(unknown.embed_query("crabs"), unknown.embed("crabs"), atol=1e-6)


def test_prompts_of_the_gguf_win_over_those_of_its_family(tmp_path):
    path = named(tmp_path, "nomic-embed-text", **{"llamacrab.prompt.query": "Q: "})
    with Llama(path) as llama:
        assert llama.prompts == {"query": "Q: "}


@pytest.mark.parametrize(
    ("name", "query", "document"),
    [
        ("Nomic Embed Text v2 Moe", "search_query: ", "search_document: "),
        ("e5-small-v2", "query: ", "passage: "),
        ("Multilingual E5 Base", "query: ", "passage: "),
        ("multilingual-e5-large-instruct", "Instruct: Given a web search query", ""),
        ("Bge Small En v1.5", "Represent this sentence", ""),
        ("bge-m3", "", ""),
        ("Qwen3 Embedding 0.6B", "Instruct: Given a web search query", ""),
        ("snowflake-arctic-embed-m", "Represent this sentence", ""),
        ("Snowflake Arctic Embed L v2.0", "query: ", ""),
        ("embeddinggemma-300m", "task: search result | query: ", "title: none | text: "),
        ("mxbai-embed-large-v1", "Represent this sentence", ""),
        ("Modernbert Embed Base", "search_query: ", "search_document: "),
        ("bge-multilingual-gemma2", "<instruct>Given a web search query", ""),
        ("Bge Reranker v2.5 Gemma2 Lightweight", None, None),
        ("jina-embeddings-v3", "Represent the query for", "Represent the document for retrieval: "),
        ("jina-embeddings-v2-base-en", None, None),
    ],
)
def test_families_are_known_by_the_name_in_their_metadata(name, query, document):
    prompts = prompts_of({"general.name": name})
    if query is None:
        assert prompts == {}
        return
    assert prompts["query"].startswith(query)
    assert bool(prompts["query"]) == bool(query)
    assert prompts["document"] == document


def test_a_name_that_says_nothing_has_no_prompts():
    assert prompts_of({"general.name": "Some E500 Model", "general.architecture": "bert"}) == {}
    assert prompts_of({}) == {}


# --------------------------------------------------------------------------------- long texts


@given(n=st.integers(0, 500), size=st.integers(1, 60), data=st.data())
def test_windows_cover_a_text_overlap_as_asked_and_are_equally_long(n, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    found = bounds(n, size, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == n
    for (_, stop), (start, _) in itertools.pairwise(found):
        assert start <= stop - overlap
    if n > size:
        assert all(stop - start == size for start, stop in found)
    assert len(found) == len(set(found))


def test_chunks_are_embedded_and_averaged_by_their_tokens(load):
    llama = load("tiny-bert")
    vocab = llama.model.vocab
    long = " ".join(TEXTS[:60])
    ids = vocab.tokenize(long, add_special=False)
    size = 50 - len(vocab.prefix_ids) - len(vocab.suffix_ids)
    parts = [ids[a:b] for a, b in bounds(len(ids), size, 10)]
    rows = llama.embed_texts(
        [[*vocab.prefix_ids, *part, *vocab.suffix_ids] for part in parts], normalize=False
    )
    want = np.average(rows, axis=0, weights=[len(part) for part in parts])
    texts = ["short", long, "", long[:300]]
    got = llama.embed_texts(texts, chunk=50, chunk_overlap=10)
    assert got.shape == (4, 32)
    assert cosines(got[1], want) > 0.9999
    assert cosines(got[0], llama.embed("short")) > 0.9999
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    assert llama.embed(long, chunk=True, prompt="query: ").shape == (32,)
    with pytest.raises(InputError, match="cannot overlap"):
        llama.embed(long, chunk=10, chunk_overlap=9)
    with pytest.raises(TextTooLongError):
        llama.embed(long)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_windows_need_no_special_tokens(load, name, start, end):
    llama = load(name)
    vocab = llama.model.vocab
    head, tail = vocab.prefix_ids if start else (), vocab.suffix_ids if end else ()
    long = " ".join(TEXTS[:12])
    ids = vocab.tokenize(long, add_special=False)
    windows = bounds(len(ids), 40 - len(head) - len(tail), 0)
    assert len(windows) > 2
    rows = llama.embed_texts([[*head, *ids[a:b], *tail] for a, b in windows], normalize=False)
    want = np.average(rows, axis=0, weights=[b - a for a, b in windows])
    got = llama.embed(long, chunk=40, start_token=start, end_token=end)
    assert cosines(got, want) > 0.9999


def test_a_failure_in_a_window_names_its_text_and_keeps_the_others(load):
    llama = load("tiny-bert")
    long = " ".join(TEXTS[:60])
    llama._scheduler._inject("not_finite", after=3, times=10_000)
    try:
        with pytest.raises(NumericalError) as info:
            llama.embed_texts([long] * 6, chunk=40, dedup=False)
    finally:
        llama._scheduler._inject("none")
    assert info.value.rows.shape == (6, 32)
    assert info.value.done.shape == (6,)
    assert 0 <= info.value.index < 6
    assert not info.value.done[info.value.index]


def test_chunks_need_a_pooling(load):
    with pytest.raises(InputError, match="chunk= needs a pooling"):
        load("tiny-bert", PoolingType.NONE).embed("x", chunk=True)


# ------------------------------------------------------------------------------------- tokens


def test_places_of_tokens_equal_those_of_transformers():
    with Llama(pooling_type=PoolingType.NONE, n_contexts=1, n_threads=1) as llama:
        unknown = int(llama.model.vocab.tokenize("\U00013000", add_special=False)[0])
        n_off = n_all = 0
        for text, want, ids in zip(TEXTS, ragged(DATA, "places"), ragged(DATA), strict=True):
            if 128 < len(ids) < 500:  # those of 500 are as long as there are
                continue
            got = llama.embed_tokens(text, truncate=True)
            if not np.array_equal(got.ids, ids):
                continue  # cut, or one of the differences of docs/limits.md
            assert got.vectors.shape == (len(ids), 384)
            known = ids != unknown
            n_off += int((got.offsets != want).any(axis=1)[known].sum())
            n_all += int(known.sum())
    assert n_all > 3000
    assert n_off / n_all < 0.01


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_token_stands_where_the_text_has_its_letters(load, name):
    llama = load(name, PoolingType.NONE)
    text = "Crabs walk sideways; 3 crabs, two shores."
    got = llama.embed_tokens(text)
    vocab = llama.model.vocab
    inner = slice(len(vocab.prefix_ids), len(got.ids) - len(vocab.suffix_ids))
    for i, (start, stop) in zip(got.ids[inner], got.offsets[inner], strict=True):
        piece = vocab.token_to_piece(int(i)).decode().strip()
        if not vocab.is_control(int(i)) and piece:
            assert text[start:stop].strip().lower() == piece.lower()
    assert (got.offsets[: inner.start] == 0).all()
    assert "".join(text[a:b] for a, b in got.offsets[inner]).replace(" ", "") == text.replace(
        " ", ""
    )


def test_places_of_a_cut_text_and_of_a_prompted_one_are_places_in_the_text(load):
    llama = load("tiny-bert", PoolingType.NONE)
    text = "crab " * 100 + "lobster " * 100
    for side in ("end", "start", "middle"):
        got = llama.embed_tokens(text, truncate=side, prompt="query: ")
        assert len(got.ids) == len(got.vectors) == llama.n_ctx
        assert got.offsets.max() <= len(text)
        assert (got.offsets[1:-1, 1] > 0).sum() > 100
        assert np.all(np.diff(got.offsets[1:-1, 0]) >= 0)
        assert (got.offsets.max() > 900) == (side != "end")


@given(full=st.lists(st.integers(0, 3), max_size=30), data=st.data())
def test_what_is_left_of_a_cut_text_is_found_again(full, data):
    start = data.draw(st.integers(0, len(full)))
    stop = data.draw(st.integers(start, len(full)))
    cut = full[:start] + full[stop:]
    places = kept(np.array(full, dtype=np.int32), np.array(cut, dtype=np.int32))
    assert [full[i] for i in places] == cut


def test_ids_come_from_no_text_and_pooled_models_have_no_tokens(load):
    got = load("tiny-bert", PoolingType.NONE).embed_tokens([2, 7, 3])
    assert got.ids.tolist() == [2, 7, 3]
    assert not got.offsets.any()
    with pytest.raises(PoolingError, match=r"PoolingType\.NONE"):
        load("tiny-bert").embed_tokens("a crab")


def test_byte_level_tokens_that_share_a_character_share_its_place(load):
    llama = load("tiny-qwen3", PoolingType.NONE)
    text = "a \U0001f980 b é"
    got = llama.embed_tokens(text)
    covered = {i for a, b in got.offsets for i in range(a, b)}
    assert covered == set(range(len(text)))
    assert unicodedata.normalize("NFC", text) == text


# ---------------------------------------------------------------------------- shared beginnings


def computed(llama):
    return sum(worker["tokens"] for worker in llama.stats()["workers"])


@pytest.mark.parametrize("name", ["tiny-qwen3"])
def test_what_texts_share_is_computed_once_and_changes_nothing(name):
    prompt = "Instruct: find the passages that answer the question about crabs\nQuery: "
    with Llama(gguf_path(name), n_contexts=1, n_threads=1) as llama:
        texts = [text[:80] for text in TEXTS]
        before = computed(llama)
        rows = llama.embed_texts(texts, prompt=prompt, dedup=False)
        shared = computed(llama) - before
        plain = llama.embed_texts([prompt + text for text in texts], dedup=False)
        alone = computed(llama) - before - shared
        assert cosines(rows, plain).min() > 0.9999
        n_prompt = len(llama.model.vocab.tokenize(prompt))
        assert alone - shared > 0.8 * n_prompt * len(texts)
        # Packs of two prompts and of none, at once.
        other = "Instruct: name the animal that this text speaks of, in one word\nText: "
        futures = [
            llama.submit(text, prompt=how) for text in texts[:50] for how in (prompt, None, other)
        ]
        got = np.array([future.result(timeout=60) for future in futures]).reshape(50, 3, -1)
        for k, how in enumerate((prompt, "", other)):
            want = llama.embed_texts([how + text for text in texts[:50]])
            assert cosines(got[:, k], want).min() > 0.9999


def test_a_shared_beginning_survives_a_failed_pack():
    prompt = "Instruct: find the passages that answer the question about crabs\nQuery: "
    with Llama(gguf_path("tiny-qwen3"), n_contexts=1, n_threads=1) as llama:
        want = llama.embed_texts(TEXTS[:60], prompt=prompt, truncate=True)
        for kind in ("decode_error", "throws"):
            llama._scheduler._inject(kind, after=1, times=1)
            try:
                llama.embed_texts(TEXTS[:60], prompt=prompt, truncate=True, dedup=False)
            except Exception:
                llama._scheduler._inject("none")
            got = llama.embed_texts(TEXTS[:60], prompt=prompt, truncate=True)
            assert cosines(got, want).min() > 0.9999


def test_models_whose_rows_see_all_tokens_share_nothing():
    prompt = "Instruct: find the passages that answer the question about crabs\nQuery: "
    for name, pooling in (
        ("tiny-bert", PoolingType.UNSPECIFIED),
        ("tiny-qwen3", PoolingType.MEAN),
        ("tiny-qwen3", PoolingType.NONE),
    ):
        with Llama(gguf_path(name), pooling_type=pooling) as llama:
            rows = llama.embed_texts(TEXTS[:30], prompt=prompt, truncate=True)
            want = llama.embed_texts([prompt + text for text in TEXTS[:30]], truncate=True)
            for row, other in zip(rows, want, strict=True):
                assert cosines(row, other).min() > 0.9999


def test_scores_of_a_causal_reranker_are_the_same_with_a_shared_beginning(load):
    llama = load("tiny-qwen3-rank")
    query = "which animal walks sideways along the shore"
    documents = [text[:120] for text in TEXTS[:60]]
    before = computed(llama)
    together = llama.rerank(query, documents)
    shared = computed(llama) - before
    pairs = llama.rerank_pairs([(query, document) for document in documents])
    assert computed(llama) - before - shared > 1.2 * shared
    np.testing.assert_allclose(together, pairs, atol=1e-3)
