"""llamacrab.convert gives the GGUF that llama.cpp's own converter gives."""

from __future__ import annotations

import base64
import json
import shutil
import warnings

import gguf
import numpy as np
import pytest
import safetensors.numpy
from helpers import DATA, TEXTS, Reader, cosines, edit, edit_tensors, gguf_path, golden, ragged

from llamacrab import Llama, PoolingType, convert, errors
from llamacrab.models.convert.pooling import choose

FOLDER = DATA / "tiny-bert-hf"
# The converter also writes what a model card says, and sizes that it estimates.
KEPT = ("bert.", "tokenizer.")
MATRIX = "encoder.layer.1.output.dense.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder, to damage."""
    return shutil.copytree(FOLDER, tmp_path / "hf")


def contents(path):
    reader = Reader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if k.startswith(KEPT)}
    # The converter knows a splitter by the hash of its vocabulary, and not a tiny one's. For BERT
    # llama.cpp does not look at it.
    assert keys.pop("tokenizer.ggml.pre") in ("jina-v2-en", "default")
    return keys, {t.name: np.array(t.data) for t in reader.tensors}


def vectors(path):
    texts = [TEXTS[i] for i in golden("tiny-bert")["text_ids"]]
    with Llama(path) as llama:
        return llama.embed_texts(texts)


def test_keys_and_tensors_are_those_of_llama_cpp_s_converter(tmp_path):
    keys, tensors = contents(convert(FOLDER, tmp_path / "ours.gguf", outtype="f32"))
    want_keys, want_tensors = contents(gguf_path("tiny-bert"))
    assert keys == want_keys
    assert tensors.keys() == want_tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, want_tensors[name], err_msg=name)


@pytest.mark.parametrize(
    ("outtype", "least"), [("f32", 0.99999), ("f16", 0.9999), ("bf16", 0.999), ("q8_0", 0.998)]
)
def test_each_type_loads_and_stays_close_to_transformers(tmp_path, outtype, least):
    rows = vectors(convert(FOLDER, tmp_path / "model.gguf", outtype=outtype))
    assert cosines(rows, golden("tiny-bert")["vectors"]).min() >= least


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json"])
def test_either_file_of_a_vocabulary_will_do(folder, tmp_path, name):
    (folder / name).unlink()
    keys, _ = contents(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    assert keys == contents(gguf_path("tiny-bert"))[0]


def vocabulary(path):
    fields = Reader(path).fields
    return (
        fields["tokenizer.ggml.tokens"].contents(),
        fields["tokenizer.ggml.token_type"].contents(),
    )


def test_an_id_without_a_token_keeps_its_place(folder, tmp_path):
    (folder / "vocab.txt").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    want, kinds = vocabulary(gguf_path("tiny-bert"))
    for word in ("##s", "##e", "e"):
        i = words.pop(word)
        want[i], kinds[i] = f"\u2581[PAD{i}]", gguf.TokenType.UNUSED
    assert max(words.values()) >= len(words)
    edit(folder, "tokenizer.json", model=tokenizer["model"])
    assert vocabulary(convert(folder, tmp_path / "model.gguf")) == (want, kinds)


def test_of_equal_tokens_the_last_counts_as_in_transformers(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    want, kinds = vocabulary(gguf_path("tiny-bert"))
    lines[50] = lines[60]
    want[50], kinds[50] = "\u2581[PAD50]", gguf.TokenType.UNUSED
    (folder / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    assert vocabulary(convert(folder, tmp_path / "model.gguf")) == (want, kinds)


def test_tokens_that_were_added_are_found_whole_in_a_text(folder, tmp_path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    place = model["vocab"].pop("##s")  # its row of the embeddings is then free
    added += [{"id": place, "content": "<Claw-7>", "special": False}]
    added += [{"id": 10**6, "content": "<far>", "special": False}]  # no row: text like any other
    edit(folder, "tokenizer.json", model=model, added_tokens=added)
    with Llama(convert(folder, tmp_path / "model.gguf")) as llama:
        ids = llama.model.vocab.tokenize("a crab<Claw-7>").tolist()
    assert ids.count(place) == 1


def unigram_folder(folder, **tokenizer):
    """Write a BERT that splits text as XLM-R does, with the weights and pieces of tiny-xlmr."""
    source = Reader(gguf_path("tiny-xlmr"))
    keys = {name: field.contents() for name, field in source.fields.items()}
    weights = {tensor.name: np.array(tensor.data) for tensor in source.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    stored = safetensors.numpy.load_file(FOLDER / "model.safetensors")
    names = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in stored}
    shutil.copytree(FOLDER, folder)
    safetensors.numpy.save_file(
        {name: weights[ours] for name, ours in names.items() if ours in weights},
        folder / "model.safetensors",
    )
    edit(folder, "config.json", vocab_size=802, type_vocab_size=1, layer_norm_eps=1e-5)
    edit(
        folder, "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False
    )
    for name in ("vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink()
    settings = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>"}
    settings = {f"{role}_token": token for role, token in settings.items()}
    settings |= {"unk_token": "<unk>", "tokenizer_class": "XLMRobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # As transformers 5.24 writes it.
    pieces = list(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    pieces[801] = ("<mask>", 0.0)
    special = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", 801: "<mask>"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    charsmap = base64.b64encode(bytes(keys["tokenizer.ggml.precompiled_charsmap"])).decode()
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    splitters = [{"type": "WhitespaceSplit"}, metaspace]
    said = {
        "added_tokens": [
            {"id": i, "content": token, "special": True, **flags} for i, token in special.items()
        ],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(said | tokenizer))
    return folder


def as_converted_for_bge_m3(folder):
    """Write tokenizer.json with the steps that transformers 4 made of a sentencepiece file."""
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    said["normalizer"] = {"type": "Sequence", "normalizers": [said["normalizer"], replace]}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    edit(folder, "tokenizer.json", normalizer=said["normalizer"], pre_tokenizer=metaspace)


@pytest.mark.parametrize("change", [lambda folder: None, as_converted_for_bge_m3])
def test_a_bert_with_a_unigram_tokenizer_is_converted_as_xlm_r_is(tmp_path, change):
    change(folder := unigram_folder(tmp_path / "hf"))
    keys, tensors = contents(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    want_keys, want_tensors = contents(gguf_path("tiny-xlmr"))
    # llama.cpp's converter leaves the mask out, as the file of pieces does.
    want_keys["tokenizer.ggml.tokens"][801] = "<mask>"
    want_keys["tokenizer.ggml.token_type"][801] = gguf.TokenType.CONTROL
    want_keys["tokenizer.ggml.scores"][801] = 0.0
    assert keys.keys() == want_keys.keys()
    for key, value in want_keys.items():
        assert keys[key] == value, key
    for name, tensor in want_tensors.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def test_a_bert_with_a_unigram_tokenizer_gives_the_tokens_and_vectors_of_transformers(tmp_path):
    path = convert(unigram_folder(tmp_path / "hf"), tmp_path / "model.gguf", outtype="f32")
    want = golden("tiny-xlmr")
    texts = [TEXTS[i] for i in want["text_ids"]]
    with Llama(path) as llama:
        for text, ids in zip(texts, ragged(want), strict=True):
            assert llama.model.vocab.tokenize(text).tolist() == ids.tolist()
        assert cosines(llama.embed_texts(texts), want["cls"]).min() >= 0.9999


def test_a_step_that_llama_cpp_does_not_have_is_refused(tmp_path):
    folder = unigram_folder(tmp_path / "hf", normalizer={"type": "Lowercase"})
    with pytest.raises(errors.ConvertError, match="has no step Lowercase"):
        convert(folder, tmp_path / "model.gguf")


def test_norms_under_their_old_names_are_read(folder, tmp_path):
    def rename(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            tensors[old] = tensors.pop(name)

    edit_tensors(folder, rename)
    rows = vectors(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    assert cosines(rows, golden("tiny-bert")["vectors"]).min() >= 0.99999


def test_weights_stored_as_bfloat16_are_read(folder, tmp_path):
    path = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    upper = {
        name: (t.view("<u4") >> 16).astype("<u2")
        for name, t in stored.items()
        if t.dtype == np.float32
    }
    header, data = {}, b""
    for name, tensor in upper.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    rows = vectors(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    assert cosines(rows, golden("tiny-bert")["vectors"]).min() >= 0.999


def only_vocab_txt(folder, content):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_bytes(content)


def edit_tokenizer(folder, **changes):
    (folder / "vocab.txt").unlink()
    edit(folder, "tokenizer.json", **changes)


def add_module(folder, kind):
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8"))
    modules.append({"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"models.{kind}"})
    path.write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"broken"), "cannot read"),
        (
            lambda f: edit(f, "config.json", model_type="xlm-roberta"),
            "only 'bert' is supported. llama.cpp's own converter may support it: "
            ".*convert_hf_to_gguf.py",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "has pytorch_model.bin. llama.cpp's own converter",
        ),
        (lambda f: edit(f, "config.json", hidden_act="relu"), "computes GELU"),
        (
            lambda f: edit(f, "config.json", architectures=["BertForSequenceClassification"]),
            "lacks the tensor classifier.weight",
        ),
        (
            lambda f: edit(f, "config.json", architectures=["BertForTokenClassification"]),
            "BertForTokenClassification has a head",
        ),
        (lambda f: edit(f, "config.json", vocab_size=3), "its config says 3"),
        (lambda f: only_vocab_txt(f, b"a\nb\n"), "lacks \\[CLS\\]"),
        (lambda f: only_vocab_txt(f, b"\xff\xfe"), "cannot read"),
        (
            lambda f: edit_tokenizer(f, model={"vocab": {"a": 0}, "merges": []}),
            "a tokenizer.json of type WordPiece or Unigram.* convert_hf_to_gguf.py",
        ),
        (
            lambda f: edit_tokenizer(f, model={"vocab": [["a", "x"]]}),
            "not a list of tokens and scores",
        ),
        (lambda f: edit_tokenizer(f, model={"vocab": {"a": "0"}}), "tokens without an id"),
        (
            lambda f: edit_tokenizer(f, model={"vocab": [["a", 0]], "byte_fallback": True}),
            "byte_fallback",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda f: edit(f, "config.json", num_hidden_layers=None), "must give num_hidden_layers"),
        (lambda f: edit(f, "config.json", hidden_size="32"), "hidden_size, .* not '32'"),
        (lambda f: edit(f, "config.json", layer_norm_eps="x"), "layer_norm_eps"),
        (lambda f: edit(f, "config.json", is_decoder=True), "is_decoder"),
        # What only loading the result shows: sizes that contradict the tensors.
        (lambda f: edit(f, "config.json", num_hidden_layers=3), "does not make a model"),
        (lambda f: edit(f, "config.json", num_hidden_layers=1), "that BERT does not have"),
        (lambda f: edit(f, "config.json", hidden_size=64), "does not make a model"),
        (lambda f: edit(f, "config.json", vocab_size=700), "does not make a model"),
        (lambda f: edit_tensors(f, lambda t: t.pop(MATRIX)), "does not make a model"),
        (lambda f: edit_tensors(f, lambda t: t[MATRIX].fill(np.nan)), "invalid data"),
        (lambda f: edit_tensors(f, lambda t: t.update(new=t[MATRIX])), "does not have: new"),
        # What sentence-transformers would compute and the GGUF would not.
        (lambda f: add_module(f, "Dense"), "cannot hold: Dense"),
        (
            lambda f: edit(f, "1_Pooling/config.json", pooling_mode_cls_token=True),
            "not 'cls_token \\+ mean_tokens'",
        ),
        (
            lambda f: edit(f, "1_Pooling/config.json", pooling_mode_mean_tokens=False),
            "mean, cls and last-token pooling are supported",
        ),
        (lambda f: (f / "1_Pooling" / "config.json").unlink(), "1_Pooling lacks config.json"),
        (lambda f: (f / "modules.json").write_text('"x"'), "does not hold a list of modules"),
        (lambda f: (f / "modules.json").write_text("[{}]"), "does not hold a list of modules"),
    ],
)
def test_a_folder_that_cannot_be_converted_says_why_and_leaves_nothing(
    folder, tmp_path, damage, message
):
    damage(folder)
    out = tmp_path / "out"
    with pytest.raises(errors.ConvertError, match=message) as info:
        convert(folder, out / "model.gguf")
    assert "\n" not in str(info.value)
    assert not out.exists() or not list(out.iterdir())


def test_what_was_there_before_a_failure_stays(folder, tmp_path):
    path = convert(folder, tmp_path / "model.gguf", outtype="f32")
    before = path.read_bytes()
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(errors.ConvertError):
        convert(folder, path)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "model.gguf"}


@pytest.mark.parametrize("pooling", ["cls_token", "lasttoken", "mean_tokens"])
def test_pooling_is_what_sentence_transformers_would_do(folder, tmp_path, pooling):
    flags = {f"pooling_mode_{name}": name == pooling for name in ("mean_tokens", "cls_token")}
    flags["pooling_mode_lasttoken"] = pooling == "lasttoken"
    edit(folder, "1_Pooling/config.json", **flags)
    rows = vectors(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    want = golden("tiny-bert")[{"cls_token": "cls", "lasttoken": "last"}.get(pooling, "mean")]
    assert cosines(rows, want).min() >= 0.9999


def silent_about_pooling(folder, name=None):
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()
    return folder.rename(folder.with_name(name)) if name else folder


def pooling_of(path):
    with Llama(path) as llama:
        return llama.model.pooling_type


def test_a_folder_that_does_not_say_how_to_pool_leaves_it_open_and_warns(folder, tmp_path):
    with pytest.warns(
        UserWarning, match="will take the mean over all tokens.*--pooling cls"
    ) as said:
        path = convert(silent_about_pooling(folder), tmp_path / "model.gguf")
    assert said[0].filename == __file__
    with Llama(path) as llama:
        assert llama.model.pooling_type == PoolingType.UNSPECIFIED
        assert llama.pooling_type == PoolingType.MEAN


def test_a_folder_without_its_list_of_modules_says_how_to_pool_in_the_pooling_s_own(
    folder, tmp_path
):
    (folder / "modules.json").unlink()
    assert pooling_of(convert(folder, tmp_path / "model.gguf")) == PoolingType.MEAN


@pytest.mark.parametrize("asked", ["cls", "CLS", PoolingType.CLS])
def test_a_pooling_that_was_asked_for_is_taken_without_a_warning(folder, tmp_path, asked):
    path = convert(silent_about_pooling(folder), tmp_path / "model.gguf", pooling=asked)
    assert pooling_of(path) == PoolingType.CLS


def test_a_pooling_that_contradicts_the_folder_is_taken_with_a_warning(folder, tmp_path):
    with pytest.warns(UserWarning, match="pooling CLS contradicts .*, which says MEAN"):
        path = convert(folder, tmp_path / "model.gguf", pooling="cls")
    assert pooling_of(path) == PoolingType.CLS


@pytest.mark.parametrize("asked", ["max", "none", PoolingType.RANK])
def test_a_pooling_that_there_is_not_is_refused(folder, tmp_path, asked):
    with pytest.raises(errors.ConvertError, match="must be one of mean, cls, last"):
        convert(folder, tmp_path / "model.gguf", pooling=asked)


def test_a_reranker_has_no_pooling_to_choose(tmp_path):
    with pytest.raises(errors.ConvertError, match="no pooling to choose"):
        convert(DATA / "tiny-bert-cross-hf", tmp_path / "model.gguf", pooling="cls")


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bge-small-en-v1.5", "CLS"),
        ("BAAI_bge-base-zh", "CLS"),
        ("snowflake-arctic-embed-xs", "CLS"),
        ("mxbai-embed-large-v1", "CLS"),
        ("gte-large-zh", "CLS"),
        ("gte-small", "MEAN"),
        ("e5-base-v2", "MEAN"),
        ("multilingual-e5-small", "MEAN"),
        ("all-MiniLM-L12-v2", "MEAN"),
        ("paraphrase-multilingual-MiniLM-L12-v2", "MEAN"),
        ("bge-micro-v2", None),  # distilled from bge-small, and pools by the mean
        ("gte-base-en-v1.5", None),
        ("mxbai-embed-xsmall-v1", None),
        ("be5-small", None),
    ],
)
@pytest.mark.parametrize("place", ["folder", "download", "card", "title", "config"])
def test_the_pooling_of_a_known_family_is_taken_from_its_name(folder, place, name, pooling):
    silent_about_pooling(folder)
    config = {}
    if place == "folder":
        folder = folder.rename(folder.with_name(name))
    elif place == "download":
        snapshot = folder.parent / f"models--owner--{name}" / "snapshots" / "0f3c"
        snapshot.parent.mkdir(parents=True)
        folder = folder.rename(snapshot)
    elif place == "card":
        card = f"---\nlicense: mit\nmodel-index:\n- name: {name}\n  results: []\n---\n# Sentences\n"
        (folder / "README.md").write_text(card)
    elif place == "title":
        (folder / "README.md").write_text(
            f"---\nlicense: mit\n---\n\n# {name}\n\nLike bge-small-en\n"
        )
    else:
        config["_name_or_path"] = f"owner/{name}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose(folder, config, None) == pooling
    assert len(caught) == (pooling is None)


def test_an_epsilon_that_is_not_given_is_that_of_transformers(folder, tmp_path):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config.pop("layer_norm_eps") == 1e-12
    path.write_text(json.dumps(config))
    keys, _ = contents(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    assert keys == contents(gguf_path("tiny-bert"))[0]


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_of_other_floats_and_with_a_prefix_are_read(folder, tmp_path, kind):
    edit_tensors(
        folder, lambda t: t.update({f"bert.{name}": t.pop(name).astype(kind) for name in list(t)})
    )
    rows = vectors(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    assert cosines(rows, golden("tiny-bert")["vectors"]).min() >= 0.9999


def test_a_folder_gives_the_same_bytes_each_time(tmp_path):
    """Processes that convert at once replace each other's file, also while it is being loaded."""
    paths = [convert(FOLDER, tmp_path / f"{i}.gguf") for i in range(4)]
    assert len({path.read_bytes() for path in paths}) == 1


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(errors.ConvertError, match="outtype must be one of"):
        convert(FOLDER, tmp_path / "model.gguf", outtype="q4_0")
