"""Whatever holds texts is embedded; what only yields something else is refused, with advice."""

from __future__ import annotations

import array
import asyncio
import collections

import numpy as np
import pyarrow as pa
import pytest

from llamacrab import Llama, errors
from llamacrab.corpus import embed_corpus
from llamacrab.requests.texts import as_list

TEXTS = ["a crab", "a lobster", "Krabbe 🦀", ""]


class Text(str):
    """A subclass of str, as some libraries make them."""

    __slots__ = ()


def pandas():
    return pytest.importorskip("pandas", reason="the package `pandas` is not installed")


def polars():
    return pytest.importorskip("polars", reason="the package `polars` is not installed")


def numpy_strings(texts, **how):
    if not hasattr(np, "dtypes") or not hasattr(np.dtypes, "StringDType"):
        pytest.skip("StringDType came with numpy 2")
    return np.array(texts, dtype=np.dtypes.StringDType(**how))


HOLDERS = {
    "tuple": tuple,
    "generator": lambda texts: (text for text in texts),
    "deque": collections.deque,
    "values": lambda texts: dict(enumerate(texts)).values(),
    "keys": lambda texts: dict.fromkeys(texts).keys(),
    "subclass": lambda texts: [Text(text) for text in texts],
    "np.str_": lambda texts: [np.str_(text) for text in texts],
    "numpy U": np.array,
    "numpy O": lambda texts: np.array(texts, dtype=object),
    "numpy T": numpy_strings,
    "numpy strided": lambda texts: np.repeat(np.array(texts), 2)[::2],
    "arrow": pa.array,
    "arrow large": lambda texts: pa.array(texts, type=pa.large_string()),
    "arrow view": lambda texts: pa.array(texts, type=pa.string_view()),
    "arrow dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "arrow chunked": lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
    "arrow sliced": lambda texts: pa.array(["x", *texts])[1:],
    "pandas": lambda texts: pandas().Series(texts),
    "pandas object": lambda texts: pandas().Series(texts, dtype=object),
    "pandas arrow": lambda texts: pandas().Series(texts, dtype=pandas().ArrowDtype(pa.string())),
    "pandas categorical": lambda texts: pandas().Series(texts, dtype="category"),
    "pandas odd index": lambda texts: pandas().Series(texts, index=[7, 3, 3, 0]),
    "pandas index": lambda texts: pandas().Index(texts),
    "polars": lambda texts: polars().Series(texts),
    "polars categorical": lambda texts: polars().Series(texts, dtype=polars().Categorical),
}
# What holds no texts, or not in order, and what its message advises.
REFUSED = {
    "str": (lambda: "a crab", r"\[text\]"),
    "np.str_": (lambda: np.str_("a crab"), r"\[text\]"),
    "bytes": (lambda: b"a crab", "decode"),
    "memoryview": (lambda: memoryview(b"a crab"), "decode"),
    "dict": (lambda: {"a": "a crab"}, r"list\(d\.values\(\)\)"),
    "OrderedDict": (lambda: collections.OrderedDict(a="a crab"), r"list\(d\.values\(\)\)"),
    "set": (lambda: {"a crab"}, r"sorted\(s\)"),
    "frozenset": (lambda: frozenset(["a crab"]), r"sorted\(s\)"),
    "pandas": (
        lambda: pandas().DataFrame({"id": [1], "body": ["x"]}),
        r'id, body: .*df\["column"\]',
    ),
    "pandas ids": (lambda: pandas().DataFrame([["x", "y"]]), r'0, 1: .*df\["column"\]'),
    "polars": (lambda: polars().DataFrame({"body": ["x"]}), r'body: .*df\["column"\]'),
    "polars lazy": (lambda: polars().LazyFrame({"body": ["x"]}), r"collect\(\)"),
    "arrow table": (lambda: pa.table({"body": ["x"]}), r'body: .*df\["column"\]'),
    "arrow batch": (lambda: pa.RecordBatch.from_pydict({"body": ["x"]}), r'df\["column"\]'),
    "structured": (lambda: np.zeros(2, dtype=[("body", "U3"), ("n", int)]), "body, n"),
    "2-d": (lambda: np.array([["a", "b"], ["c", "d"]]), r"shape \(2, 2\): .*array\[:, 0\]"),
    "3-d": (lambda: np.full((1, 2, 3), "a", dtype=object), r"shape \(1, 2, 3\)"),
    "0-d": (lambda: np.array("a crab"), r"shape \(\): .*array\.item\(\)"),
    "None": (lambda: None, "NoneType"),
    "number": (lambda: 7, "int"),
}
WITH_NULL = {
    "list None": (lambda: ["a", "b", None], "None"),
    "list nan": (lambda: ["a", "b", float("nan")], "nan"),
    "list np.nan": (lambda: ["a", "b", np.float32("nan")], "nan"),
    "list pd.NA": (lambda: ["a", "b", pandas().NA], "<NA>"),
    "numpy": (lambda: np.array(["a", "b", None], dtype=object), "None"),
    "numpy T": (lambda: numpy_strings(["a", "b", None], na_object=None), "None"),
    "pandas": (lambda: pandas().Series(["a", "b", None]), "(nan|None)"),
    "pandas NA": (lambda: pandas().Series(["a", "b", None], dtype="string"), "<NA>"),
    "polars": (lambda: polars().Series(["a", "b", None]), "None"),
    "arrow": (lambda: pa.array(["a", "b", None]), "None"),
    "arrow dictionary": (lambda: pa.array(["a", "b", None]).dictionary_encode(), "None"),
    "arrow chunked": (lambda: pa.chunked_array([["a"], ["b", None]]), "None"),
}


@pytest.fixture
def holder(request):
    return HOLDERS[request.param](TEXTS)


holders = pytest.mark.parametrize("holder", HOLDERS, indirect=True)
refused = pytest.mark.parametrize(("make", "advice"), REFUSED.values(), ids=REFUSED)


@holders
def test_whatever_holds_texts_is_embedded(load, holder):
    expected = load("tiny-bert").embed_texts(TEXTS)
    np.testing.assert_allclose(load("tiny-bert").embed_texts(holder), expected, atol=1e-6)


@pytest.mark.parametrize("call", ["embed_documents", "embed_iter", "submit", "aembed_texts"])
@pytest.mark.parametrize("kind", ["tuple", "generator", "arrow chunked", "pandas", "numpy T"])
def test_every_call_takes_what_holds_texts(load, call, kind):
    llama, texts = load("tiny-bert"), HOLDERS[kind](TEXTS)
    run = {
        "embed_documents": lambda: llama.embed_documents(texts),
        "embed_iter": lambda: np.concatenate(list(llama.embed_iter(texts, batch_size=3))),
        "submit": lambda: llama.submit(texts).result(),
        "aembed_texts": lambda: asyncio.run(llama.aembed_texts(texts)),
    }
    np.testing.assert_allclose(run[call](), llama.embed_texts(TEXTS), atol=1e-6)


@pytest.mark.parametrize("kind", ["tuple", "generator", "numpy T", "arrow chunked", "pandas"])
def test_a_corpus_may_be_whatever_holds_texts(load, tmp_path, kind):
    texts = ["a crab", "a lobster", "Krabbe 🦀", "a shrimp"]
    embed_corpus(HOLDERS[kind](texts), tmp_path / "out", load("tiny-bert"), format="npy")
    rows = np.load(tmp_path / "out" / "part-000000.npy")
    np.testing.assert_allclose(rows, load("tiny-bert").embed_texts(texts), atol=1e-6)


@pytest.mark.parametrize("corpus", [{"a": "a crab"}, {"a crab"}, b"a crab"])
def test_a_corpus_that_holds_no_texts_is_refused(load, tmp_path, corpus):
    with pytest.raises(errors.InputError, match=r"^embed_corpus takes a list of texts, not"):
        embed_corpus(corpus, tmp_path / "out", load("tiny-bert"), format="npy")


@holders
def test_a_stream_yields_str_from_whatever_holds_texts(load, holder):
    rows = np.concatenate(list(load("tiny-bert").embed_iter(holder, batch_size=3)))
    np.testing.assert_allclose(rows, load("tiny-bert").embed_texts(TEXTS), atol=1e-6)


@refused
@pytest.mark.parametrize("call", ["embed_texts", "embed_documents", "embed_iter"])
def test_mnf_48_what_holds_no_texts_is_refused_with_what_to_pass(load, call, make, advice):
    with pytest.raises(errors.InputError, match=f"^{call} takes a list of texts, not .*{advice}"):
        getattr(load("tiny-bert"), call)(make())


@pytest.mark.parametrize("kind", ["bytes", "dict", "set", "pandas", "structured", "2-d", "None"])
def test_what_holds_no_texts_is_not_submitted(load, kind):
    make, advice = REFUSED[kind]
    with pytest.raises(errors.InputError, match=f"^submit takes a list of texts, not .*{advice}"):
        load("tiny-bert").submit(make())


@refused
def test_what_holds_no_documents_is_refused_with_what_to_pass(load, make, advice):
    with pytest.raises(errors.InputError, match=f"^rerank takes a list of texts, not .*{advice}"):
        load("tiny-bert-rank").rerank("query", make())


@pytest.mark.parametrize(("make", "shown"), WITH_NULL.values(), ids=WITH_NULL)
def test_mnf_48_a_missing_text_is_refused_with_its_index(load, make, shown):
    texts = make()
    with pytest.raises(errors.InputError, match=rf"text 2 is missing \({shown}\): leave it out"):
        load("tiny-bert").embed_texts(texts)
    with pytest.raises(errors.InputError, match=rf"text 2 is missing \({shown}\)") as info:
        list(load("tiny-bert").embed_iter(texts))
    assert info.value.index == 2
    with pytest.raises(errors.InputError, match=rf"text 2 is missing \({shown}\): leave it out"):
        load("tiny-bert-rank").rerank("query", texts)


@pytest.mark.parametrize("wrong", [None, [10**6], "too long " * 200, []])
def test_an_error_in_a_stream_counts_the_texts_of_earlier_blocks(load, wrong):
    texts = [*(f"text {i}" for i in range(10)), wrong]
    with pytest.raises(errors.InputError, match="text 10") as info:
        list(load("tiny-bert").embed_iter(texts, batch_size=2))
    assert info.value.index == 10


def test_an_error_in_a_window_of_a_stream_names_the_text(load, monkeypatch):
    llama = load("tiny-bert")
    texts = ["a crab", "long " * 400, "another " * 400, "a lobster"]
    llama._scheduler._inject("not_finite", 0, 10**6)
    try:
        with pytest.raises(errors.NumericalError, match="in one of its windows") as info:
            list(llama.embed_iter(texts, batch_size=2, chunk=True))
    finally:
        llama._scheduler._inject("none")
    assert info.value.index in range(4)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (pa.array([b"a", b"b"]), "text 0 is bytes, not str"),
        (np.array([b"a", b"b"]), "text 0 is bytes, not str"),
        (pa.array([1, 2]), "text 0 is int, not str"),
        (np.array([1.5, 2.5]), "text 0 is float, not str"),
        (pa.array([{"a": 1}]), "text 0"),
        ([["a", "b"]], "text 0 is list, not str: embed_texts"),
    ],
)
def test_what_holds_something_else_names_it(load, texts, message):
    with pytest.raises(errors.InputError, match=message):
        load("tiny-bert").embed_texts(texts)


@pytest.mark.parametrize(
    "run",
    [
        Llama.embed,
        Llama.embed_query,
        lambda llama, texts: asyncio.run(llama.aembed(texts)),
    ],
    ids=["embed", "embed_query", "aembed"],
)
@pytest.mark.parametrize(
    "texts", [["a", "b"], ("a",), np.array(["a", "b"]), np.array(["a"], object)]
)
def test_several_texts_where_one_is_wanted_name_embed_texts(load, run, texts):
    with pytest.raises(errors.InputError, match=r"not str: embed_texts .* take several texts"):
        run(load("tiny-bert"), texts)


@pytest.mark.parametrize("kind", [str, Text, np.str_])
def test_one_text_may_be_of_a_subclass_of_str(load, kind):
    llama = load("tiny-bert")
    expected = llama.embed("Krabbe 🦀")
    np.testing.assert_allclose(llama.embed(kind("Krabbe 🦀")), expected, atol=1e-6)
    np.testing.assert_allclose(llama.submit(kind("Krabbe 🦀")).result(), expected, atol=1e-6)
    scores = load("tiny-bert-rank").rerank(kind("query"), [kind("document")])
    assert scores == pytest.approx(load("tiny-bert-rank").rerank("query", ["document"]), abs=1e-6)


@pytest.mark.parametrize(
    "ids",
    [
        [2, 7, 3],
        (2, 7, 3),
        np.array([2, 7, 3]),
        np.array([2, 7, 3], np.uint8),
        range(2, 9),
        array.array("i", [2, 7, 3]),
    ],
)
def test_the_ids_of_one_text_are_one_text(load, ids):
    row = load("tiny-bert").submit(ids).result()
    assert row.shape == (32,)
    np.testing.assert_allclose(row, load("tiny-bert").embed(list(ids)), atol=1e-6)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([[2, 7, 3], [2, 9, 3]]),
        pa.array([[2, 7, 3], [2, 9, 3]]),
        ((2, 7, 3), (2, 9, 3)),
    ],
)
@pytest.mark.parametrize("call", ["embed_texts", "submit"])
def test_rows_of_ids_are_several_texts(load, ids, call):
    rows = getattr(load("tiny-bert"), call)(ids)
    rows = rows.result() if call == "submit" else rows
    expected = load("tiny-bert").embed_texts([[2, 7, 3], [2, 9, 3]])
    np.testing.assert_allclose(rows, expected, atol=1e-6)


@pytest.mark.parametrize("empty", [[], (), np.array([]), pa.array([], pa.string())])
def test_no_texts_give_no_rows(load, empty):
    assert load("tiny-bert").embed_texts(empty).shape == (0, 32)
    assert load("tiny-bert").submit(empty).result().shape == (0, 32)


@pytest.mark.parametrize("dtype", [None, "str", "object"])
def test_an_empty_series_gives_no_rows(load, dtype):
    empty = pandas().Series([], dtype=dtype)
    assert load("tiny-bert").embed_texts(empty).shape == (0, 32)
    assert load("tiny-bert").submit(empty).result().shape == (0, 32)


PAIRS = [("query", "a crab"), ("query", "a lobster")]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tuple(PAIRS),
        lambda: iter(PAIRS),
        lambda: np.array(PAIRS),
        lambda: {"query": "a crab"}.items(),
        lambda: pandas().DataFrame(PAIRS).itertuples(index=False),
        lambda: zip(*polars().DataFrame(PAIRS, orient="row"), strict=True),
    ],
    ids=["tuple", "iterator", "numpy", "items", "pandas", "polars"],
)
def test_pairs_come_from_whatever_holds_them(load, make):
    scores = load("tiny-bert-rank").rerank_pairs(make())
    expected = load("tiny-bert-rank").rerank_pairs(PAIRS)[: len(scores)]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("pairs", "advice"),
    [
        ({"query": "a crab"}, r"list\(d\.items\(\)\)"),
        (pa.table({"query": ["a"], "document": ["b"]}), r'zip\(df\["query"\]'),
        ({("a", "b")}, "no order"),
        ("ab", "one str"),
    ],
)
def test_what_holds_no_pairs_is_refused_with_what_to_pass(load, pairs, advice):
    with pytest.raises(errors.InputError, match=f"takes a list of pairs, not .*{advice}"):
        load("tiny-bert-rank").rerank_pairs(pairs)


def test_a_missing_query_or_document_of_a_pair_names_the_pair(load):
    llama = load("tiny-bert-rank")
    with pytest.raises(errors.InputError, match="query of pair 1 is NoneType"):
        llama.rerank_pairs([("a", "b"), (None, "b")])
    with pytest.raises(errors.InputError, match="text 1 is missing"):
        llama.rerank_pairs([("a", "b"), ("a", None)])


def test_a_list_is_taken_as_it_is():
    texts = ["a crab"] * 1000
    assert as_list(texts, "embed_texts") is texts
