"""Our kernels compute what ggml's do: node by node, layer by layer, model by model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import (
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

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
NO_PRODUCT = -1
GELU = 8
# What rounding weights or activations to bf16, or to 8 bits, may cost: of the squared values.
BF16_LOSS, Q8_0_LOSS, INT8_LOSS = 2e-5, 5e-5, 5e-4
TYPES = {F32: 5e-7, F16: BF16_LOSS, BF16: BF16_LOSS, Q8_0: Q8_0_LOSS}  # GELU is a table in ggml
MASKS = {"none": 0, "texts": 1, "window": 2, "causal": 3, "holes": 4, "blind": 5, "distance": 6}


def check(kind: str, *numbers: int) -> float:
    """Return how far our result is from ggml's; all nodes must be taken."""
    off = _core._check_kernels(kind, list(numbers))
    assert off != -1, "the backend does not take this graph"
    return off


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("rows", "k", "m"),
    [(1, 64, 32), (2, 32, 2), (5, 64, 33), (12, 96, 31), (13, 384, 384), (97, 128, 100)],
)
def test_products_of_any_size_with_all_that_is_fused_into_them(kind, rows, k, m):
    for bias, act, residual, norm in (
        (0, -1, 0, 0),
        (1, -1, 0, 0),
        (1, GELU, 0, 0),
        (1, -1, 1, 0),
        (1, -1, 1, 1),
        (0, -1, 1, 2),
        (0, -1, 0, 1),
    ):
        # The variance of two values may be next to nothing, which a norm magnifies.
        if norm and m < 8:
            continue
        few = 20 if m < 8 else 1  # four values are no average
        assert check("linear", rows, k, m, kind, bias, act, residual, norm, 0) < few * TYPES[kind]


@pytest.mark.parametrize("act", [4, 6, 7, 8, 9, 10, 16])
def test_every_activation_after_a_product(act):
    for kind in (F32, BF16):
        assert check("linear", 19, 64, 70, kind, 1, act, 0, 0, 0) < TYPES[kind]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 96, 128])
def test_attention_under_every_mask_and_head_size(d, mask):
    bias = 8 if mask == "distance" else 0
    for kind, least in ((NO_PRODUCT, 1e-8), (F32, 1e-6), (BF16, BF16_LOSS)):
        off = check("attention", d, 4, 2, MASKS[mask], 0, bias, kind, 7, 20, 1, 50, 33, 2)
        assert off < least


@pytest.mark.parametrize("length", [1, 2, 3, 5, 11, 12, 13, 31, 32, 33, 64, 200])
def test_attention_over_texts_of_every_length(length):
    # For few queries ggml sums in f16.
    for kind, least in ((NO_PRODUCT, 1e-6), (BF16, BF16_LOSS)):
        assert check("attention", 32, 3, 3, 1, 0, 0, kind, length, 4, length) < least


def test_attention_with_capped_scores():
    assert check("attention", 64, 4, 2, 1, 30, 0, NO_PRODUCT, 7, 20, 1, 50) < 1e-8


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("rope", [0, 1])
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("kind", TYPES)
def test_layers_of_an_encoder(kind, gated, rope, before):
    for rms in (0, 1):
        off = check("layer", 128, 4, 256, kind, gated, rope, rms, before, 0, 7, 20, 40, 1)
        assert off < 5 * TYPES[kind]


def test_rows_too_wide_for_8_bits_stay_in_bf16():
    assert check("linear", 3, 8196, 64, BF16, 1, -1, 0, 0, 1) < BF16_LOSS
    assert check("linear", 3, 8192, 64, BF16, 1, -1, 0, 0, 1) < INT8_LOSS


def test_layers_in_8_bits():
    assert check("linear", 33, 64, 64, BF16, 1, -1, 1, 1, 1) < INT8_LOSS
    for kind in (F32, BF16, Q8_0):
        assert check("layer", 128, 4, 256, kind, 0, 0, 0, 0, 1, 7, 20, 40) < INT8_LOSS


@pytest.mark.parametrize("width", [2, 7, 32, 100, 384])
def test_what_is_done_row_by_row(width):
    for rms in (0, 1):
        for residual in (0, 1):
            if width > 2:
                assert check("norm", width, 9, rms, residual) < 1e-9
    for op in (0, 1, 2, 4, 5):
        for split, swapped in ((1, 0), (0, 0), (0, 1)):
            assert check("glu", width, 7, op, split, swapped) < 1e-6
    for op in (4, 6, 7, 8, 9, 10, 16):
        assert check("unary", width, 7, op) < 1e-6
    for multiply in (0, 1):
        for one_row in (0, 1):
            assert check("binary", width, 5, multiply, one_row) == 0
    assert check("pool", width, 3, 9, 20, 1) < 1e-10
    assert check("rows", width, 9, 3, 8, 0, 0) == 0
    assert check("copy", width, 5, 7) == 0


@pytest.mark.parametrize("neox", [0, 1])
def test_rotated_positions(neox):
    for d, dims in ((32, 32), (64, 64), (64, 32), (80, 20)):
        assert check("rope", d, 4, 10, dims, neox) < 1e-10


def test_a_team_does_all_work_once_whatever_its_size_was_before():
    assert check("team", 1, 2, 5, 3) == 0


CHECKS = """
import json, sys
from llamacrab import _core
off = [_core._check_kernels(kind, numbers) for kind, *numbers in json.loads(sys.argv[1])]
print(json.dumps([_core.kernels(), off]))
"""


@pytest.mark.parametrize("name", ["plain", "avx2", "avx512_bf16"])
def test_every_kernel_set_that_this_cpu_runs(name):
    cases = [
        *(["linear", 29, 96, 70, kind, 1, GELU, 0, 0, 0] for kind in TYPES),
        *(["linear", 29, 96, 64, kind, 1, -1, 1, 1, 0] for kind in TYPES),
        ["linear", 29, 96, 64, BF16, 1, -1, 1, 1, 1],
        *(["attention", 48, 4, 2, m, 0, 0, kind, 7, 20, 1] for m in range(6) for kind in TYPES),
        *(["layer", 64, 4, 96, kind, 1, 1, 0, 0, 0, 7, 20] for kind in TYPES),
        ["norm", 100, 9, 0, 1],
        ["pool", 33, 4, 9],
    ]
    found, off = json.loads(check_python(CHECKS, json.dumps(cases), LLAMACRAB_KERNELS=name))
    if found != name:
        pytest.skip(f"this CPU has no {name}")
    assert min(off) >= 0
    assert max(off) < INT8_LOSS


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
        *((outtype, "int8", 0.995) for outtype in ("f32", "bf16", "q8_0")),
    ],
)
def test_minilm_stays_close_to_sentence_transformers(outtype, backend, least):
    with Llama(fetch_default_model(outtype), cpu_backend=backend) as llama:
        vectors = llama.embed_texts(TEXTS)
    assert cosines(vectors, golden("minilm")["vectors"]).min() >= least


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_threads_of_a_context_do_not_change_vectors(n_threads):
    rows = {}
    for n in (1, n_threads):
        with Llama(cpu_backend="llamacrab", n_contexts=1, n_threads=n) as llama:
            rows[n] = llama.embed_texts(TEXTS, dedup=False)
    np.testing.assert_allclose(rows[n_threads], rows[1], atol=1e-6)


def test_a_row_has_the_same_bits_whatever_it_is_packed_with():
    with Llama(cpu_backend="llamacrab", n_threads=1) as llama:
        # For packs of fewer tokens llama.cpp puts norms on ggml's code.
        texts = [text for text in TEXTS if len(llama.model.vocab.tokenize(text)) >= 32]
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


def test_auto_leaves_decoders_to_ggml():
    with Llama(gguf_path("tiny-qwen3")) as llama:
        assert llama.model.cpu_backend == "ggml"


def test_auto_takes_encoders_where_the_cpu_multiplies_bf16(monkeypatch):
    monkeypatch.delenv("LLAMACRAB_CPU_BACKEND", raising=False)
    fast = _core.kernels() == "avx512_bf16"
    with Llama(gguf_path("tiny-bert")) as llama:
        assert llama.model.cpu_backend == ("llamacrab" if fast else "ggml")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ModelError, match="cpu_backend must be"):
        Llama(gguf_path("tiny-bert"), cpu_backend="cuda")
