"""Our kernels compute what ggml's do: node by node, layer by layer, model by model."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from helpers import (
    DATA,
    FAMILIES,
    PAIRS,
    RERANKERS,
    TEXTS,
    check_python,
    cosines,
    gguf_path,
    golden,
)

from llamacrab import Llama, _core, fetch_default_model
from llamacrab.errors import ModelError

pytestmark = pytest.mark.skipif(
    _core.kernels() is None, reason="built with the system's libllama, which leaves the kernels out"
)

F32, F16, Q4_0, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, BF16 = 0, 1, 2, 8, 12, 13, 14, 20, 30  # ggml_type
GELU = 8  # ggml_unary_op
# The error from rounding weights or activations to bf16, or to 8 bits, relative to squared values.
BF16_LOSS, Q8_0_LOSS, INT8_LOSS = 2e-5, 5e-5, 5e-4
# Without VNNI activations have 7 bits: four products must fit in 16.
HAS_VNNI = _core.kernels() in ("avx2_vnni", "avx512_vnni", "avx512_bf16")
INT8_LEAST_COSINE = 0.998 if HAS_VNNI else 0.996
TYPES = {F32: 5e-7, F16: BF16_LOSS, BF16: BF16_LOSS, Q8_0: Q8_0_LOSS}  # GELU is a table in ggml
# A quarter of the tokens of all texts, and the vectors that are farthest from the golden ones.
LENGTHS = np.diff(golden("minilm")["offsets"])
SOME = [i for i, n in enumerate(LENGTHS) if n < 100 or n == LENGTHS.max()]
KERNELS = ("generic", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16")
MASKS = ("none", "texts", "window", "causal", "holes", "fully_masked", "distance")


def check(kind: str, **fields: int | str | list[int]) -> float:
    """Return how far our result is from ggml's; all nodes must be taken.

    The fields of each kind of graph are those of a struct in kernels/testing/compare_with_ggml.cpp.
    """
    off = _core._compare_with_ggml(kind, fields)
    assert off != -1, "the backend does not take this graph"
    return off


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(
    ("rows", "k", "m"),
    [(1, 64, 32), (2, 32, 2), (5, 64, 33), (12, 96, 31), (13, 384, 384), (97, 128, 100)],
)
def test_products_of_any_size_with_all_that_is_fused_into_them(type, rows, k, m):
    for fused in (
        {},
        {"bias": True},
        {"bias": True, "act": GELU},
        {"bias": True, "residual": True},
        {"bias": True, "residual": True, "norm": "layer"},
        {"residual": True, "norm": "rms"},
        {"norm": "layer"},
    ):
        # The variance of two values may be next to nothing, which a norm magnifies.
        if "norm" in fused and m < 8:
            continue
        few = 20 if m < 8 else 1  # four values are no average
        assert check("linear", rows=rows, k=k, m=m, type=type, **fused) < few * TYPES[type]


@pytest.mark.parametrize("type", [F32, F16, BF16])
@pytest.mark.parametrize(("rows", "k", "m"), [(1, 2048, 3000), (12, 768, 1100), (130, 256, 700)])
def test_products_that_threads_divide(type, rows, k, m):
    # Few rows are divided by columns, many by rows.
    for fused in (
        {"bias": True, "act": GELU},
        {"bias": True, "residual": True, "norm": "layer"},
        {"residual": True},
    ):
        assert check("linear", rows=rows, k=k, m=m, type=type, **fused) < TYPES[type]
        assert check("linear", rows=rows, k=k, m=m, type=type, int8=True, **fused) < INT8_LOSS


@pytest.mark.parametrize("type", [F16, BF16])
def test_layers_that_threads_divide(type):
    graph = {"width": 512, "heads": 8, "ff": 1536, "lengths": [7, 11, 2]}
    for gated in (False, True):
        assert check("layer", type=type, gated=gated, norm_first=True, **graph) < 5 * BF16_LOSS
        assert check("layer", type=type, gated=gated, int8=True, **graph) < INT8_LOSS


@pytest.mark.parametrize("type", [Q4_0, Q4_K, Q5_K, Q6_K, IQ4_NL])
@pytest.mark.parametrize(("rows", "k", "m"), [(1, 256, 32), (7, 512, 70), (100, 768, 33)])
def test_products_of_quantized_weights(type, rows, k, m):
    # ggml rounds the activations to 8 bits.
    for fused in ({"bias": True, "act": GELU}, {"residual": True, "norm": "layer"}):
        assert check("linear", rows=rows, k=k, m=m, type=type, **fused) < 4 * Q8_0_LOSS


@pytest.mark.parametrize("k", [2, 33, 254, 256, 257, 258, 512, 770])
def test_products_of_any_number_of_blocks(k):
    type = F16 if k % 2 else BF16
    if k % 2 and _core.kernels() == "avx512_bf16":
        pytest.skip("these kernels multiply pairs of bf16")
    for fused in ({}, {"bias": True, "act": GELU}, {"residual": True, "norm": "layer"}):
        few = 20 if k < 8 else 1
        assert check("linear", rows=15, k=k, m=70, type=type, **fused) < few * BF16_LOSS


@pytest.mark.parametrize("act", [4, 6, 7, 8, 9, 10, 16])
def test_every_activation_after_a_product(act):
    for type in (F32, BF16):
        assert check("linear", rows=19, k=64, m=70, type=type, bias=True, act=act) < TYPES[type]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 96, 128])
def test_attention_under_every_mask_and_head_size(d, mask):
    graph = {"d": d, "heads": 4, "kv_heads": 2, "mask": mask, "lengths": [7, 20, 1, 50, 33, 2]}
    if mask == "distance":
        graph["max_bias"] = 8
    assert check("attention", **graph) < 1e-8
    assert check("attention", product_type=F32, **graph) < 1e-6
    assert check("attention", product_type=BF16, **graph) < BF16_LOSS


@pytest.mark.parametrize("length", [1, 2, 3, 5, 11, 12, 13, 31, 32, 33, 64, 200])
def test_attention_over_texts_of_every_length(length):
    graph = {"d": 32, "heads": 3, "kv_heads": 3, "lengths": [length, 4, length]}
    assert check("attention", **graph) < 1e-6  # for few queries ggml sums in f16
    assert check("attention", product_type=BF16, **graph) < BF16_LOSS


@pytest.mark.parametrize("cache_type", [F32, F16])
@pytest.mark.parametrize("prefix", [0, 1, 21])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_attention_through_a_cache(heads, kv_heads, prefix, cache_type):
    for d in (32, 80, 256):
        graph = {"d": d, "heads": heads, "kv_heads": kv_heads, "prefix": prefix}
        for lengths in ([1], [7, 20, 1, 70, 33], [130]):
            off = check("cached_attention", cache_type=cache_type, lengths=lengths, **graph)
            assert off < 1e-6  # for few queries ggml sums in f16
    assert check("cached_attention", softcap=30, lengths=[40, 3], **graph) < 1e-6


def test_attention_with_capped_scores():
    lengths = [7, 20, 1, 50]
    assert check("attention", d=64, heads=4, kv_heads=2, softcap=30, lengths=lengths) < 1e-8


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("type", TYPES)
def test_layers_of_an_encoder(type, gated, rope, norm_first):
    for rms in (False, True):
        off = check(
            "layer",
            width=128,
            heads=4,
            ff=256,
            type=type,
            gated=gated,
            rope=rope,
            rms=rms,
            norm_first=norm_first,
            lengths=[7, 20, 40, 1],
        )
        assert off < 5 * TYPES[type]


def test_rows_too_wide_for_8_bits_stay_in_bf16():
    graph = {"rows": 3, "m": 64, "type": BF16, "bias": True, "int8": True}
    assert check("linear", k=8196, **graph) < BF16_LOSS
    assert check("linear", k=8192, **graph) < INT8_LOSS


def test_layers_in_8_bits():
    fused = {"bias": True, "residual": True, "norm": "layer"}
    assert check("linear", rows=33, k=64, m=64, type=BF16, int8=True, **fused) < INT8_LOSS
    graph = {"width": 128, "heads": 4, "ff": 256, "lengths": [7, 20, 40]}
    for type in (F32, BF16, Q8_0):
        assert check("layer", type=type, int8=True, **graph) < INT8_LOSS


@pytest.mark.parametrize("k", [64, 68, 72, 80, 96, 100, 384])
def test_products_in_8_bits_rotate_rows_of_any_width(k):
    # The output of a norm is rotated by the kernel, and the weights when they are packed.
    for fused in ({}, {"bias": True, "act": GELU}, {"residual": True, "norm": "layer"}):
        assert check("linear", rows=14, k=k, m=70, type=F32, int8=True, **fused) < INT8_LOSS


def test_an_outlier_in_a_row_does_not_make_the_other_values_coarse():
    graph = {"rows": 14, "k": 384, "m": 70, "type": F32, "int8": True, "outlier": 60}
    assert check("linear", **graph) < INT8_LOSS / (5 if HAS_VNNI else 2)


@pytest.mark.parametrize("width", [2, 7, 32, 100, 384])
def test_what_is_done_row_by_row(width):
    for rms in (False, True):
        for residual in (False, True):
            if width > 2:
                assert check("norm", width=width, rows=9, rms=rms, residual=residual) < 1e-9
    for op in (0, 1, 2, 4, 5):  # ggml_glu_op
        for halves in ({"split": True}, {}, {"swapped": True}):
            assert check("glu", width=width, rows=7, op=op, **halves) < 1e-6
    for op in (4, 6, 7, 8, 9, 10, 16):  # ggml_unary_op
        assert check("unary", width=width, rows=7, op=op) < 1e-6
    for multiply in (False, True):
        for one_row in (False, True):
            off = check("binary", width=width, rows=5, multiply=multiply, one_row=one_row)
            assert off == 0
    assert check("pool", width=width, lengths=[3, 9, 20, 1]) < 1e-10
    assert check("get_rows", width=width, rows=9, chosen=[3, 8, 0, 0]) == 0
    assert check("copy", width=width, heads=5, tokens=7) == 0


@pytest.mark.parametrize("neox", [False, True])
def test_rotated_positions(neox):
    for d, dims in ((32, 32), (64, 64), (64, 32), (80, 20)):
        for extended in ({}, {"factors": True}, {"yarn": True}, {"factors": True, "yarn": True}):
            graph = {"d": d, "heads": 4, "tokens": 10, "dims": dims, "neox": neox}
            assert check("rope", **graph, **extended) < 1e-10


def test_a_case_names_its_fields():
    with pytest.raises(ValueError, match="missing field: rows"):
        check("unary", width=2, op=4)
    with pytest.raises(ValueError, match="unknown field: colour"):
        check("unary", width=2, rows=1, op=4, colour=1)
    with pytest.raises(ValueError, match="no such kind of case: nary"):
        check("nary")


def test_a_thread_pool_does_all_work_once_whatever_its_size_was_before():
    assert _core._check_thread_pool([1, 2, 5, 3]) == 0


CHECKS = """
import json, sys
from llamacrab import _core
off = [_core._compare_with_ggml(kind, fields) for kind, fields in json.loads(sys.argv[1])]
print(json.dumps([_core.kernels(), off]))
"""


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_table_that_this_cpu_runs(name):
    product = {"rows": 29, "k": 96, "m": 64, "bias": True, "residual": True, "norm": "layer"}
    gelu = {"rows": 29, "k": 96, "m": 70, "bias": True, "act": GELU}
    attention = {"d": 48, "heads": 4, "kv_heads": 2, "lengths": [7, 20, 1]}
    cached = {"d": 48, "heads": 4, "kv_heads": 2, "prefix": 5, "lengths": [7, 20, 1]}
    rope = {"d": 80, "heads": 3, "tokens": 9, "dims": 40}
    layer = {"width": 64, "heads": 4, "ff": 96, "gated": True, "rope": True, "lengths": [7, 20]}
    cases = [
        *(("linear", {**gelu, "type": type}) for type in TYPES),
        *(("linear", {**product, "type": type}) for type in TYPES),
        ("linear", {**product, "type": BF16, "int8": True}),
        *(
            ("attention", {**attention, "mask": mask, "product_type": type})
            for mask in MASKS[:6]
            for type in TYPES
        ),
        *(("layer", {**layer, "type": type}) for type in TYPES),
        *(("cached_attention", {**cached, "cache_type": type}) for type in (F32, F16)),
        *(("rope", {**rope, "neox": neox, "yarn": True}) for neox in (True, False)),
        ("norm", {"width": 100, "rows": 9, "residual": True}),
        ("pool", {"width": 33, "lengths": [4, 9]}),
    ]
    found, off = json.loads(check_python(CHECKS, json.dumps(cases), LLAMACRAB_KERNELS=name))
    if found != name:
        pytest.skip(f"this CPU has no {name}")
    assert min(off) >= 0
    assert max(off) < INT8_LOSS


VECTORS = """
import json, sys
from helpers import TEXTS
from llamacrab import Llama, _core, fetch_default_model
with Llama(fetch_default_model("q8_0"), cpu_backend="int8", n_contexts=1) as llama:
    vectors = llama.embed_texts([text for text in TEXTS if len(text) < 40])
print(json.dumps([_core.kernels(), vectors.tolist()]))
"""


def test_products_in_8_bits_give_the_same_vectors_with_every_kernel_table():
    tables = [
        json.loads(check_python(VECTORS, LLAMACRAB_KERNELS=name, PYTHONPATH=str(DATA.parent)))
        for name in KERNELS
    ]
    tables = {name: np.array(vectors) for name, vectors in tables}
    for pair in itertools.combinations(tables, 2):
        one, other = (tables[name] for name in pair)
        assert cosines(one, other).min() >= (0.996 if "avx2" in pair else 0.998)  # 7 bits, or 8


def test_the_generic_kernels_are_found_under_their_former_name():
    found, _ = json.loads(check_python(CHECKS, "[]", LLAMACRAB_KERNELS="plain"))
    assert found == "generic"


# ------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("backend", ["ggml", "llamacrab"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_equal_those_of_transformers_with_either_backend(name, backend):
    want = golden(name)
    with Llama(gguf_path(name), cpu_backend=backend) as llama:
        vectors = llama.embed_texts([TEXTS[i] for i in want["text_ids"]])
        one = llama.embed(TEXTS[want["text_ids"][0]])
    assert cosines(vectors, want["vectors"]).min() >= 0.9999
    assert cosines(one, vectors[0]) >= 0.9999


@pytest.mark.parametrize("backend", ["ggml", "llamacrab"])
@pytest.mark.parametrize("name", RERANKERS)
def test_scores_equal_those_of_transformers_with_either_backend(name, backend):
    want = golden(name)["scores"][:, 0].reshape(len(PAIRS["queries"]), -1)
    with Llama(gguf_path(name), cpu_backend=backend) as llama:
        scores = [llama.rerank(query, PAIRS["documents"]) for query in PAIRS["queries"]]
    np.testing.assert_allclose(scores, want, atol=0.02)


@pytest.mark.parametrize(
    ("outtype", "backend", "least"),
    [
        *(("f32", backend, 0.9999) for backend in ("ggml", "llamacrab")),
        *(("bf16", backend, 0.9999) for backend in ("ggml", "llamacrab")),
        ("q8_0", "ggml", 0.997),
        ("q8_0", "llamacrab", 0.999),
        *((outtype, "int8", INT8_LEAST_COSINE) for outtype in ("f32", "bf16", "q8_0")),
    ],
)
def test_minilm_stays_close_to_sentence_transformers(outtype, backend, least):
    with Llama(fetch_default_model(outtype), cpu_backend=backend) as llama:
        vectors = llama.embed_texts([TEXTS[i] for i in SOME])
    assert cosines(vectors, golden("minilm")["vectors"][SOME]).min() >= least


def rows_by_threads(n_threads):
    with Llama(cpu_backend="llamacrab", n_contexts=1, n_threads=n_threads) as llama:
        return llama.embed_texts([TEXTS[i] for i in SOME], dedup=False)


@pytest.fixture(scope="module")
def rows_of_one_thread():
    return rows_by_threads(1)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_threads_of_a_context_do_not_change_vectors(rows_of_one_thread, n_threads):
    np.testing.assert_allclose(rows_by_threads(n_threads), rows_of_one_thread, atol=1e-6)


def test_a_row_has_the_same_bits_whatever_it_is_packed_with():
    with Llama(cpu_backend="llamacrab", n_threads=1) as llama:
        # For packs of fewer tokens llama.cpp puts norms on ggml's code.
        texts = [TEXTS[i] for i in SOME if len(llama.model.vocab.tokenize(TEXTS[i])) >= 32]
        packed = llama.embed_texts(texts, dedup=False)
        single = np.stack([llama.embed(text) for text in texts])
    assert len(texts) > 50
    np.testing.assert_array_equal(packed, single)


def test_two_backends_in_one_process_do_not_disturb_each_other():
    with (
        Llama(cpu_backend="ggml") as theirs,
        Llama(cpu_backend="llamacrab") as ours,
        Llama(cpu_backend="ggml") as again,
    ):
        assert [one.model.cpu_backend for one in (theirs, ours)] == ["ggml", "llamacrab"]
        first = theirs.embed_texts(TEXTS[:32])
        ours.embed_texts(TEXTS[:32])
        np.testing.assert_allclose(again.embed_texts(TEXTS[:32]), first, atol=1e-6)


def test_a_text_longer_than_any_pack_is_computed():
    text = " ".join(TEXTS)
    with Llama(cpu_backend="ggml") as theirs, Llama(cpu_backend="llamacrab") as ours:
        assert cosines(ours.embed(text, truncate=True), theirs.embed(text, truncate=True)) >= 0.9999


# ------------------------------------------------------------------------------------ the switches


def test_the_environment_variable_sets_what_auto_means(monkeypatch):
    monkeypatch.setenv("LLAMACRAB_CPU_BACKEND", "ggml")
    with Llama(gguf_path("tiny-bert")) as llama:
        assert llama.model.cpu_backend == "ggml"
    with Llama(gguf_path("tiny-bert"), cpu_backend="llamacrab") as llama:
        assert llama.model.cpu_backend == "llamacrab"


@pytest.mark.parametrize("backend", ["ggml", "llamacrab"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_is_split_between_backends_no_more_than_it_must_be(name, backend, caplog):
    # Ours leaves to ggml: the embeddings of the tokens, the LM head, and experts.
    most = 1 if backend == "ggml" else 4 if name == "tiny-nomic-moe" else 3
    with caplog.at_level("DEBUG"), Llama(gguf_path(name), cpu_backend=backend, n_contexts=1):
        pass
    assert [int(n) for n in re.findall(r"splits = (\d+)", caplog.text)][-1] <= most


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_takes_the_kernels_where_they_are_not_the_generic_ones(name, monkeypatch):
    monkeypatch.delenv("LLAMACRAB_CPU_BACKEND", raising=False)
    fast = _core.kernels() != "generic"
    with Llama(gguf_path(name)) as llama:
        assert llama.model.cpu_backend == ("llamacrab" if fast else "ggml")
        assert llama.model.cpu_backend_reason == (
            "faster on this CPU" if fast else "llamacrab has no fast kernels for this CPU"
        )


def test_an_unknown_backend_is_refused():
    with pytest.raises(ModelError, match="cpu_backend must be"):
        Llama(gguf_path("tiny-bert"), cpu_backend="cuda")


def test_the_backend_keeps_pipelines_over_gpus_and_refuses_views_of_packed_weights():
    assert _core._complaint_about_backend() == ""


def test_a_node_that_is_not_to_be_computed_keeps_its_value():
    assert check("skipped", rows=13, width=64) < TYPES[F32]


def test_products_in_8_bits_are_reported_as_they_are(caplog, tmp_path):
    with Llama(fetch_default_model("q8_0"), cpu_backend="int8") as llama:
        model = llama.model
        assert model.ffn_types == {"Q8_0": 12}
        assert model.wants_int8
        if _core.kernels_have_int8():
            assert (model.cpu_backend, model.n_int8_matrices) == ("int8", 12)
            assert "int8" not in caplog.text
        else:
            assert (model.cpu_backend, model.n_int8_matrices) == ("llamacrab", 0)
            assert 'cpu_backend="int8" has no effect on this CPU' in caplog.text


def test_a_file_whose_matrices_are_too_narrow_for_8_bits_says_so(caplog):
    with Llama(gguf_path("tiny-bert"), cpu_backend="int8") as llama:
        assert (llama.model.cpu_backend, llama.model.n_int8_matrices) == ("llamacrab", 0)
    assert 'cpu_backend="int8"' in caplog.text
    if _core.kernels_have_int8():
        assert "takes 0 of 4 feed-forward matrices (4 F32)" in caplog.text
