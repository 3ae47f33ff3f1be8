"""Reranking with causal models without a rank head, by the logits of the tokens they answer with.

The expected ids and scores are those of transformers: oracle/make_answers.py.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import PAIRS, Reader, gguf_path, golden, ragged, rewrite_gguf

from llamacrab import Llama, Model, PoolingType, errors
from llamacrab.cli.app import main
from llamacrab.requests.answers import AnswerHead
from llamacrab.requests.pair_template import PairFormat, PairTemplate
from llamacrab.requests.reranker_families import FAMILIES, family_of

STRING, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
GOLDEN = golden("answers")
INSTRUCTION = "Find what a crab would eat"
CASES = [(query, document) for query in PAIRS["queries"] for document in PAIRS["documents"]]
QUERY, DOCUMENTS = PAIRS["queries"][0], PAIRS["documents"]
N = len(DOCUMENTS)
SIZES: dict[str, Any] = {"n_contexts": 1, "n_threads": 1}
# Flash attention and the memory of a causal model work in half precision.
DRIFT = 5e-3
QWEN3, MXBAI, BGE, ZERANK = FAMILIES
# What reranks a model with each of the golden arrays.
WAYS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "zerank": {"answers": "yes", "template": ZERANK.template[0]},
    "mxbai": {},
    # The tiny vocabularies spell "Yes" with several tokens, and that of Gemma 2 spells BOS "<s>".
    "gemma2": {"answers": ["1"], "template": "".join(BGE.template).replace("<bos>", "<s>")},
    "gemma": {"answers": ["1"]},
    "llama": {"answers": ("the", "of"), "template": "<s>{query} : {document} :"},
}
INSTRUCTED = ("qwen3", "mxbai")


def untied(name: str, tokens: tuple[str, ...], weight: np.ndarray) -> np.ndarray:
    """Return an output matrix that has these rows for these tokens."""
    with Model(gguf_path(name)) as model:
        rng = np.random.default_rng(4)
        matrix = rng.normal(size=(len(model.vocab), model.n_embd)).astype(np.float32)
        for token, row in zip(tokens, weight, strict=True):
            matrix[model.vocab.tokenize(token, add_special=False)] = row
    return matrix


def as_gemma(path: Path) -> Path:
    """Make a Gemma of the Gemma 2, with a name that is known and Gemma's spelling of BOS."""
    source = gguf_path("tiny-gemma2")
    fields = Reader(source).fields
    tokens = ["<bos>" if t == "<s>" else t for t in fields["tokenizer.ggml.tokens"].contents()]
    extra = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    return rewrite_gguf(
        source,
        path,
        {
            "general.name": ("Bge Reranker v2 Gemma", STRING),
            "tokenizer.ggml.tokens": (tokens, gguf.GGUFValueType.ARRAY),
        },
        drop=(
            "gemma2.pooling_type",
            *(f"gemma2.{key}" for key in extra),
            *(f"blk.{i}.post_{part}_norm.weight" for i in (0, 1) for part in ("attention", "ffw")),
        ),
        architecture="gemma",
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Return a model file for each of the golden arrays."""
    folder = tmp_path_factory.mktemp("answers")
    bias = untied("tiny-qwen2", ("1", "0"), GOLDEN["mxbai_bias"])[:, 0].copy()
    return {
        "qwen3": rewrite_gguf(
            gguf_path("tiny-qwen3"),
            folder / "qwen3.gguf",
            {"general.name": ("Qwen3 Reranker 0.6B", STRING)},
            drop=("qwen3.pooling_type",),
        ),
        "zerank": gguf_path("tiny-qwen3"),
        "mxbai": rewrite_gguf(
            gguf_path("tiny-qwen2"),
            folder / "qwen2.gguf",
            {"general.name": ("Mxbai Rerank Base v2", STRING)},
            drop=("qwen2.pooling_type", "qwen2.attention.causal"),
            tensors={
                "output.weight": untied("tiny-qwen2", ("1", "0"), GOLDEN["mxbai_weight"]),
                "output.bias": bias,
            },
        ),
        "gemma2": rewrite_gguf(
            gguf_path("tiny-gemma2"),
            folder / "gemma2.gguf",
            {"gemma2.final_logit_softcapping": (0.5, FLOAT)},
        ),
        "gemma": as_gemma(folder / "gemma.gguf"),
        "llama": gguf_path("tiny-llama"),
    }


@pytest.fixture(scope="module")
def rerankers(files) -> Iterator[dict[str, Llama]]:
    """Give a `Llama` for each of the golden arrays."""
    llamas = {name: Llama(files[name], **way, **SIZES) for name, way in WAYS.items()}
    yield llamas
    for llama in llamas.values():
        llama.close()


@pytest.mark.parametrize(
    ("name", "instruction"), [*((n, None) for n in WAYS), *((n, INSTRUCTION) for n in INSTRUCTED)]
)
def test_ids_and_scores_are_those_of_the_authors_code(rerankers, name, instruction):
    llama = rerankers[name]
    case = f"{name}_instructed" if instruction else name
    want = ragged(GOLDEN, f"{case}_ids", f"{case}_offsets")
    for (query, document), ids in zip(CASES, want, strict=True):
        pairs = PairTemplate(llama.model, query, llama._pair_format, instruction)
        np.testing.assert_array_equal(pairs.tokenization(limit=512).tokenize(document), ids)
    expected = GOLDEN[f"{case}_scores"] * (5 if name == "zerank" else 1)
    scores = llama.rerank_pairs(CASES, instruction=instruction)
    assert scores.shape == (len(CASES),)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=DRIFT)
    assert np.ptp(expected) > 50 * DRIFT
    for i, query in enumerate(PAIRS["queries"]):
        np.testing.assert_allclose(
            llama.rerank(query, DOCUMENTS, instruction=instruction),
            expected[i * N : (i + 1) * N],
            atol=DRIFT,
        )


@pytest.mark.parametrize("backend", ["ggml", "llamacrab"])
def test_the_lm_head_is_not_computed(files, backend):
    with Llama(files["qwen3"], cpu_backend=backend, **SIZES) as llama:
        llama._scheduler._count_heads()  # counts from now on
        scores = llama.rerank(QUERY, DOCUMENTS)
        n_headless, n_heads = llama._scheduler._count_heads()
    assert n_headless > 0
    assert n_heads == 0
    np.testing.assert_allclose(scores, GOLDEN["qwen3_scores"][:N], atol=DRIFT)


def test_the_lm_head_makes_no_difference(files, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_HEADLESS", "0")
    with Llama(files["gemma2"], **WAYS["gemma2"], **SIZES) as llama:
        scores = llama.rerank(QUERY, DOCUMENTS)
        assert llama._scheduler._count_heads()[0] == 0
    np.testing.assert_allclose(scores, GOLDEN["gemma2_scores"][:N], atol=DRIFT)


@pytest.mark.parametrize("name", WAYS)
def test_a_packed_document_has_the_score_of_one_alone(rerankers, name):
    llama = rerankers[name]
    alone = np.concatenate([llama.rerank(QUERY, [document]) for document in DOCUMENTS])
    np.testing.assert_allclose(llama.rerank(QUERY, DOCUMENTS), alone, atol=DRIFT)
    np.testing.assert_allclose(llama.rerank(QUERY, DOCUMENTS[::-1]), alone[::-1], atol=DRIFT)


def test_deterministic_scores_are_equal_to_the_last_bit(files):
    with Llama(files["mxbai"], deterministic=True, **SIZES) as llama:
        alone = np.concatenate([llama.rerank(QUERY, [document]) for document in DOCUMENTS])
        np.testing.assert_array_equal(llama.rerank(QUERY, DOCUMENTS), alone)
        np.testing.assert_allclose(alone, GOLDEN["mxbai_scores"][:N], atol=DRIFT)


def n_computed(llama: Llama) -> int:
    return sum(worker["tokens"] for worker in llama.stats()["workers"])


@pytest.mark.parametrize("name", WAYS)
def test_documents_share_the_tokens_before_them(files, name):
    with Llama(files[name], **WAYS[name], **SIZES) as llama:
        assert llama._scheduler.shares_prefix
        pairs = PairTemplate(llama.model, QUERY, llama._pair_format).tokenization(limit=512)
        n_before = n_common(pairs.tokenize("crabs"), pairs.tokenize("Gulls"))
        n_all = sum(len(pairs.tokenize(document)) for document in DOCUMENTS)
        scores = llama.rerank(QUERY, DOCUMENTS)
        # Tokens of a prefix that is computed once are not counted.
        assert n_computed(llama) <= n_all - N * (n_before - 2)
    with Llama(files[name], **WAYS[name], deterministic=True, **SIZES) as llama:
        assert not llama._scheduler.shares_prefix
        np.testing.assert_allclose(scores, llama.rerank(QUERY, DOCUMENTS), atol=DRIFT)
        assert n_computed(llama) == n_all


def n_common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many ids two texts have in common before the first that differs."""
    n = min(len(a), len(b))
    return int(np.argmin(np.append(a[:n] == b[:n], False)))


def test_pairs_of_several_queries_share_the_beginning_of_the_template(rerankers):
    llama = rerankers["qwen3"]
    n_all = sum(map(len, ragged(GOLDEN, "qwen3_ids", "qwen3_offsets")))
    before = n_computed(llama)
    llama.rerank_pairs(CASES)
    head = QWEN3.template[0].split("{query}")[0]
    n_head = len(llama.model.vocab.tokenize(head, add_special=False, parse_special=True))
    assert n_computed(llama) - before <= n_all - len(CASES) * (n_head - 2)
    assert n_head > 50


# ---------------------------------------------------------------------- the output matrix


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("tensor", ["token_embd.weight", "output.weight"])
def test_rows_of_the_output_matrix_are_those_that_gguf_reads(tmp_path, kind, tensor):
    kind = gguf.GGMLQuantizationType[kind]
    matrix = untied("tiny-qwen3", (), np.empty((0, 32)))
    path = rewrite_gguf(
        gguf_path("tiny-qwen3"),
        tmp_path / "model.gguf",
        tensors={tensor: matrix},
        quantized={tensor: kind},
    )
    stored = next(one for one in Reader(path).tensors if one.name == tensor)
    tokens = [0, 5, 899, 5]
    with Model(path) as model:
        weights, bias = model.output_rows(tokens)
    expected = gguf.dequantize(stored.data, stored.tensor_type)[tokens]
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(bias, np.zeros(4))
    assert weights.dtype == bias.dtype == np.float32
    assert np.abs(weights - matrix[tokens]).max() < 0.5


def test_a_quantized_output_matrix_scores_nearly_the_same(tmp_path, files):
    path = rewrite_gguf(
        files["mxbai"],
        tmp_path / "q8_0.gguf",
        tensors={"output.weight": untied("tiny-qwen2", ("1", "0"), GOLDEN["mxbai_weight"])},
        quantized={"output.weight": gguf.GGMLQuantizationType.Q8_0},
    )
    with Llama(path, **SIZES) as llama:
        scores = llama.rerank_pairs(CASES)
    difference = np.abs(scores - GOLDEN["mxbai_scores"])
    assert DRIFT < difference.max() < 0.1


def test_the_output_matrix_may_be_in_another_file(tmp_path, files):
    first = rewrite_gguf(files["mxbai"], tmp_path / "model.gguf", tensors_per_shard=6)
    assert "output.weight" not in {tensor.name for tensor in Reader(first).tensors}
    with Llama(first, **SIZES) as llama:
        np.testing.assert_allclose(llama.rerank_pairs(CASES), GOLDEN["mxbai_scores"], atol=DRIFT)


def test_rows_of_wrong_tokens_are_refused(files):
    with Model(files["mxbai"]) as model:
        weights, bias = model.output_rows([7])
        assert (weights.shape, bias.shape) == ((1, 32), (1,))
        for wrong in ([-1], [len(model.vocab)]):
            with pytest.raises(errors.InputError, match="not in range"):
                model.output_rows(wrong)


def test_without_a_cap_in_the_file_gemma_2_has_that_of_llama_cpp(files, tmp_path):
    path = rewrite_gguf(
        files["gemma2"], tmp_path / "model.gguf", drop=("gemma2.final_logit_softcapping",)
    )
    with Llama(path, **WAYS["gemma2"], **SIZES) as llama:
        scores = llama.rerank_pairs(CASES)
    logits = 0.5 * np.arctanh(GOLDEN["gemma2_scores"] / 0.5)
    np.testing.assert_allclose(scores, 30 * np.tanh(logits / 30), atol=DRIFT)


# ------------------------------------------------------------------------------- which model


def test_a_reranker_that_llama_cpp_gave_a_head_has_the_same_scores_without_it(tmp_path):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3-rank"), tmp_path / "model.gguf", drop=("cls.output.weight",)
    )
    head = golden("tiny-qwen3-rank")
    with Llama(path, answers=("yes", "no"), **SIZES) as llama:
        scores = llama.rerank_pairs(CASES, activation="sigmoid")
    np.testing.assert_allclose(scores, head["scores"][:, 0], atol=DRIFT)


@pytest.mark.parametrize(
    ("source", "name", "family"),
    [
        ("tiny-qwen3", "Qwen3 Reranker 0.6B", QWEN3),
        ("tiny-qwen3", "Qwen3-Reranker-8B", QWEN3),
        ("tiny-qwen3", "Zerank 1 Small", ZERANK),
        ("tiny-qwen3", "zerank-2-reranker", ZERANK),
        ("tiny-qwen2", "Mxbai Rerank Large v2", MXBAI),
        ("tiny-qwen2", "Mxbai Rerank Large v1", None),
        ("tiny-qwen3", "Mxbai Rerank Large v2", None),
        ("tiny-qwen3", "Qwen3 Embedding 0.6B", None),
        ("tiny-gemma2", "Bge Reranker v2 Gemma", None),
        ("tiny-gemma2", "Bge Reranker v2.5 Gemma2 Lightweight", None),
    ],
)
@pytest.mark.parametrize("key", ["general.name", "general.basename"])
def test_families_are_known_by_name_and_architecture(tmp_path, source, name, family, key):
    path = rewrite_gguf(gguf_path(source), tmp_path / "model.gguf", {key: (name, STRING)})
    with Model(path) as model:
        assert family_of(model) is family


def test_a_family_is_known_by_its_template(tmp_path):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3"),
        tmp_path / "model.gguf",
        {"tokenizer.chat_template.rerank": (QWEN3.template[0], STRING)},
    )
    with Llama(path, pooling_type="rank", **SIZES) as llama:
        np.testing.assert_allclose(llama.rerank_pairs(CASES), GOLDEN["qwen3_scores"], atol=DRIFT)
        instructed = llama.rerank_pairs(CASES, instruction=INSTRUCTION)
    np.testing.assert_allclose(instructed, GOLDEN["qwen3_instructed_scores"], atol=DRIFT)


def test_an_instruction_reaches_a_reranker_with_a_head(tmp_path):
    path = rewrite_gguf(
        gguf_path("tiny-qwen3-rank"),
        tmp_path / "model.gguf",
        {"tokenizer.chat_template.rerank": (QWEN3.template[0], STRING)},
    )
    filled = QWEN3.instructed[0].replace("{instruction}", INSTRUCTION)
    with Llama(path, **SIZES) as llama, Llama(path, template=filled, **SIZES) as other:
        scores = llama.rerank(QUERY, DOCUMENTS, instruction=INSTRUCTION)
        np.testing.assert_allclose(scores, other.rerank(QUERY, DOCUMENTS), atol=DRIFT)
        assert np.abs(scores - llama.rerank(QUERY, DOCUMENTS)).max() > 10 * DRIFT


def test_a_pooling_of_the_file_or_the_caller_comes_before_the_name(files, tmp_path):
    own = rewrite_gguf(
        files["qwen3"],
        tmp_path / "model.gguf",
        {"qwen3.pooling_type": (PoolingType.LAST, gguf.GGUFValueType.UINT32)},
    )
    with Llama(own, **SIZES) as llama:
        assert llama.pooling_type == PoolingType.LAST
        assert llama.embed("a crab").shape == (32,)
    with Llama(own, pooling_type="rank", **SIZES) as llama:
        np.testing.assert_allclose(
            llama.rerank(QUERY, DOCUMENTS), GOLDEN["qwen3_scores"][:N], atol=DRIFT
        )
    with Llama(files["qwen3"], pooling_type="mean", **SIZES) as llama:
        assert llama.embed("a crab").shape == (32,)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama", "tiny-gemma2"])
def test_an_unknown_causal_model_does_not_rerank_unless_asked(name):
    with pytest.raises(errors.PoolingError, match=r"answers=\('yes', 'no'\), template="):
        Llama(gguf_path(name), pooling_type="rank", **SIZES)
    with Llama(gguf_path(name), **SIZES) as llama:
        assert llama.pooling_type in (PoolingType.LAST, PoolingType.MEAN)
        with pytest.raises(errors.PoolingError, match=r"or answers= for a causal model"):
            llama.rerank("q", ["d"])


def test_a_reranker_by_answers_does_not_embed(rerankers):
    assert rerankers["qwen3"].pooling_type == PoolingType.RANK
    for call in (rerankers["qwen3"].embed, rerankers["qwen3"].embed_query):
        with pytest.raises(errors.PoolingError, match=r"use rerank\(\)"):
            call("a crab")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            ("crustacean", "no"),
            r"the answer 'crustacean' is not one token of this model, but \d+: \[",
        ),
        ("", r"the answer '' is not one token of this model, but 0"),
        (("yes", "yes"), "both answers are the same token"),
        (("yes", "no", "1"), "answers must be one or two strings"),
        ((), "answers must be one or two strings"),
        ((1, 2), "answers must be one or two strings"),
        ((b"yes",), "answers must be one or two strings"),
    ],
)
def test_wrong_answers_are_refused(answers, message):
    with pytest.raises(errors.InputError, match=message):
        Llama(gguf_path("tiny-qwen3"), answers=answers, template="{query} {document}", **SIZES)


def test_answers_are_for_causal_models_without_a_head():
    both = {"answers": ("yes", "no"), "template": "{query} {document}"}
    with pytest.raises(errors.PoolingError, match="has a rank head: leave out answers="):
        Llama(gguf_path("tiny-qwen3-rank"), **both)
    for name in ("tiny-bert", "tiny-qwen2"):
        with pytest.raises(errors.PoolingError, match="is for causal models"):
            Llama(gguf_path(name), **both)
    with pytest.raises(errors.InputError, match="is for pooling_type='rank', not MEAN"):
        Llama(gguf_path("tiny-qwen3"), pooling_type="mean", **both)
    with (
        Model(gguf_path("tiny-bert")) as model,
        pytest.raises(errors.UnsupportedModelError, match="has the architecture bert"),
    ):
        AnswerHead(model, ("a",))


def test_the_answers_of_the_family_change_nothing_and_others_do(files):
    with Llama(files["qwen3"], answers=["yes", "no"], **SIZES) as llama:
        np.testing.assert_allclose(
            llama.rerank(QUERY, DOCUMENTS), GOLDEN["qwen3_scores"][:N], atol=DRIFT
        )
    with Llama(files["qwen3"], answers=["no", "yes"], **SIZES) as llama:
        scores = llama.rerank(QUERY, DOCUMENTS, activation="sigmoid")
        np.testing.assert_allclose(1 - scores, GOLDEN["qwen3_scores"][:N], atol=DRIFT)
        assert llama.rerank(QUERY, DOCUMENTS).max() > 1  # raw


def test_a_divisor_divides_the_logit(files):
    with Model(files["zerank"]) as model:
        rows = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)
        logits = AnswerHead(model, ("yes",))(rows)
        np.testing.assert_allclose(
            AnswerHead(model, ("yes",), divisor=ZERANK.divisor)(rows), logits / 5, rtol=1e-6
        )
        assert AnswerHead(model, ("yes",))(rows[:0]).shape == (0, 1)


# ---------------------------------------------------------------------- templates and instructions


@pytest.mark.parametrize("name", ["zerank", "gemma2", "llama"])
def test_an_instruction_that_no_template_takes_is_refused(rerankers, name):
    with pytest.raises(errors.InputError, match="takes no instruction"):
        rerankers[name].rerank(QUERY, DOCUMENTS, instruction=INSTRUCTION)
    with pytest.raises(errors.InputError, match="takes no instruction"):
        rerankers[name].rerank_pairs(CASES, instruction=INSTRUCTION)


def test_an_instruction_must_be_a_text(rerankers):
    with pytest.raises(errors.InputError, match="the instruction is int, not str"):
        rerankers["qwen3"].rerank(QUERY, DOCUMENTS, instruction=3)


def test_a_template_of_the_caller_may_take_an_instruction(files):
    way = {"answers": ("yes", "no"), "template": QWEN3.instructed[0]}
    with Llama(files["zerank"], **way, **SIZES) as llama:
        scores = llama.rerank_pairs(CASES, instruction=INSTRUCTION, activation="sigmoid")
        np.testing.assert_allclose(scores, GOLDEN["qwen3_instructed_scores"], atol=DRIFT)
        with pytest.raises(errors.InputError, match="pass instruction="):
            llama.rerank(QUERY, DOCUMENTS)


@pytest.mark.parametrize("template", ["{query}", "{document}", "{query}{document}{document}", ""])
def test_a_template_without_a_placeholder_is_refused(template):
    for name in ("tiny-qwen3", "tiny-bert-rank"):
        answers = "yes" if name == "tiny-qwen3" else None
        with pytest.raises(errors.InputError, match=r"must hold \{query\}, and \{document\}"):
            Llama(gguf_path(name), answers=answers, template=template, **SIZES)


def test_a_missing_or_useless_template_is_refused():
    with pytest.raises(errors.InputError, match="has no template for pairs: pass template="):
        Llama(gguf_path("tiny-qwen3"), answers=("yes", "no"), **SIZES)
    with pytest.raises(errors.InputError, match="template is bytes, not str"):
        Llama(gguf_path("tiny-bert-rank"), template=b"{query}{document}", **SIZES)
    with pytest.raises(errors.InputError, match="template= is for rerankers"):
        Llama(gguf_path("tiny-qwen3"), template="{query} {document}", **SIZES)


def test_texts_that_spell_placeholders_and_special_tokens_stay_texts(rerankers):
    model, form = rerankers["qwen3"].model, rerankers["qwen3"]._pair_format

    def ids(query, document, instruction):
        pairs = PairTemplate(model, query, form, instruction)
        return pairs.tokenization(limit=500).tokenize(document)

    odd = ids("q {document} {instruction} <|im_end|>", "d {query}", "i {query} <|im_start|>")
    text = model.vocab.detokenize(odd)
    for piece in ("q {document} {instruction} <|im_end|>", "d {query}", "i {query} <|im_start|>"):
        assert piece in text
    plain = ids("q", "d", "i")
    for special in ("<|im_end|>", "<|im_start|>"):
        [token] = model.vocab.tokenize(special, add_special=False, parse_special=True)
        assert (odd == token).sum() == (plain == token).sum() > 0


def test_parts_of_a_template_are_tokenized_on_their_own(rerankers):
    model = rerankers["mxbai"].model
    query = "who eats crabs?"  # "?" and the line break would be one token
    apart = PairTemplate(model, query, PairFormat(("{query}", "\n", "{document}")))
    split = [model.vocab.tokenize(text, add_special=False) for text in (query, "\n", "gulls")]
    np.testing.assert_array_equal(
        apart.tokenization(limit=99).tokenize("gulls"), np.concatenate(split)
    )


@pytest.mark.parametrize("name", WAYS)
def test_only_the_document_is_cut(rerankers, name):
    llama = rerankers[name]
    template = PairTemplate(llama.model, QUERY, llama._pair_format)
    long = "gulls " * 600
    full = template.tokenization(limit=10_000).tokenize(long)
    cut = template.tokenization(limit=400, truncate=True).tokenize(long)
    short = template.tokenization(limit=10_000).tokenize("x")
    n_tail = n_common(full[::-1], short[::-1])
    assert len(full) > len(cut) == 400
    assert n_tail > 0
    np.testing.assert_array_equal(cut[400 - n_tail :], full[len(full) - n_tail :])
    n_kept = 400 - n_tail - 1  # what follows the cut may be split together with what is before it
    np.testing.assert_array_equal(cut[:n_kept], full[:n_kept])
    with pytest.raises(errors.TextTooLongError):
        llama.rerank(QUERY, [long])
    np.testing.assert_allclose(
        llama.rerank(QUERY, [long], truncate=True),
        llama.rerank_pairs([(QUERY, long)], truncate=True),
        atol=DRIFT,
    )


# ------------------------------------------------------------------------------- the other calls


def test_a_probability_keeps_its_value_and_a_difference_becomes_one(rerankers):
    for activation in ("sigmoid", "softmax"):
        np.testing.assert_allclose(
            rerankers["qwen3"].rerank(QUERY, DOCUMENTS, activation=activation),
            GOLDEN["qwen3_scores"][:N],
            atol=DRIFT,
        )
    raw = GOLDEN["mxbai_scores"].astype(np.float64)
    np.testing.assert_allclose(
        rerankers["mxbai"].rerank_pairs(CASES, activation="sigmoid"),
        1 / (1 + np.exp(-raw)),
        atol=DRIFT,
    )
    for name in ("mxbai", "gemma2"):
        with pytest.raises(errors.InputError, match="single output"):
            rerankers[name].rerank(QUERY, DOCUMENTS, activation="softmax")
    with pytest.raises(errors.InputError, match="activation must be"):
        rerankers["qwen3"].rerank(QUERY, DOCUMENTS, activation="relu")


def test_all_ways_to_rerank_agree(rerankers):
    llama, expected = rerankers["mxbai"], GOLDEN["mxbai_instructed_scores"]
    order = np.argsort(-expected[:N])

    async def ask():
        return (
            await llama.arerank(QUERY, DOCUMENTS, instruction=INSTRUCTION),
            await llama.arerank_pairs(CASES, instruction=INSTRUCTION),
        )

    scores, pairs = asyncio.run(ask())
    np.testing.assert_allclose(scores, expected[:N], atol=DRIFT)
    np.testing.assert_allclose(pairs, expected, atol=DRIFT)
    future = llama.submit_rerank(
        QUERY, DOCUMENTS, top_k=3, return_documents=True, instruction=INSTRUCTION
    )
    best = future.result(timeout=60)
    assert [result.index for result in best] == order[:3].tolist()
    assert [result.document for result in best] == [DOCUMENTS[i] for i in order[:3]]
    assert best[0].score == pytest.approx(expected[order[0]], abs=DRIFT)
    assert llama.rerank(QUERY, []).shape == (0,)
    assert llama.rerank(QUERY, [], top_k=2) == []
    assert llama.labels == []


def test_a_pickled_reranker_asks_and_scores_in_the_same_way(rerankers):
    with pickle.loads(pickle.dumps(rerankers["llama"])) as other:
        assert other._given == rerankers["llama"]._given
        np.testing.assert_allclose(other.rerank_pairs(CASES), GOLDEN["llama_scores"], atol=DRIFT)


def test_an_error_holds_the_scores_so_far(files):
    with Llama(files["mxbai"], **SIZES) as llama:
        with pytest.raises(errors.TextTooLongError) as info:
            llama.rerank(QUERY, [*DOCUMENTS * 100, "gulls " * 600])
        assert info.value.index == 100 * N
        rows, done = info.value.rows, info.value.done
        assert rows.shape == done.shape == (100 * N + 1,)
        assert not done[-1]
        want = np.tile(GOLDEN["mxbai_scores"][:N], 100)
        np.testing.assert_allclose(rows[done], want[done[:-1]], atol=DRIFT)
        llama._scheduler._inject("not_finite")
        with pytest.raises(errors.NumericalError):
            llama.rerank(QUERY, DOCUMENTS[:1])
        np.testing.assert_allclose(llama.rerank(QUERY, DOCUMENTS), want[:N], atol=DRIFT)


def test_a_closed_reranker_says_so(files):
    llama = Llama(files["qwen3"], **SIZES)
    llama.close()
    with pytest.raises(errors.ClosedError):
        llama.rerank(QUERY, DOCUMENTS)


# ------------------------------------------------------------------------------- the command line


def run(*args: object) -> str:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_line_reranks_by_answers(files, tmp_path):
    source = tmp_path / "documents.txt"
    source.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    way = WAYS["llama"]
    flags = [flag for answer in way["answers"] for flag in ("--answer", answer)]
    shown = run(
        "rerank", QUERY, source, "-m", files["llama"], *flags, "--template", way["template"]
    )
    scores = [float(line.split("\t")[0]) for line in shown.splitlines()]
    np.testing.assert_allclose(scores, -np.sort(-GOLDEN["llama_scores"][:N]), atol=DRIFT)
    shown = run("rerank", QUERY, source, "-m", files["mxbai"], "--instruction", INSTRUCTION)
    scores = [float(line.split("\t")[0]) for line in shown.splitlines()]
    want = -np.sort(-GOLDEN["mxbai_instructed_scores"][:N])
    np.testing.assert_allclose(scores, want, atol=DRIFT)


def test_info_names_the_answers_of_a_known_reranker(files):
    assert "reranks by       its answers yes, no (Qwen3-Reranker)" in run("info", files["qwen3"])
    assert "reranks by" not in run("info", files["llama"])
