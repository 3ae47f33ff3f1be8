"""llamacrab.convert gives the GGUF that llama.cpp's own converter gives."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy
from helpers import DATA, TEXTS, cosines, edit, edit_tensors, gguf_path, golden

from llamacrab import Llama, PoolingType, convert, errors

FOLDER = DATA / "tiny-bert-hf"
# The converter also writes what a model card says, and sizes that it estimates.
KEPT = ("bert.", "tokenizer.")
MATRIX = "encoder.layer.1.output.dense.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder, to damage."""
    return shutil.copytree(FOLDER, tmp_path / "hf")


def contents(path):
    reader = gguf.GGUFReader(path)
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


def test_a_folder_without_vocab_txt_is_read_from_tokenizer_json(folder, tmp_path):
    (folder / "vocab.txt").unlink()
    keys, _ = contents(convert(folder, tmp_path / "model.gguf", outtype="f32"))
    assert keys == contents(gguf_path("tiny-bert"))[0]


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
        (lambda f: edit(f, "config.json", model_type="t5"), "knows 'bert' only"),
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
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), "lacks \\[CLS\\]"),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff\xfe"), "cannot read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
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
        (lambda f: (f / "modules.json").write_text('"x"'), "holds no list of modules"),
        (lambda f: (f / "modules.json").write_text("[{}]"), "holds no list of modules"),
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


def test_a_folder_that_does_not_say_how_to_pool_leaves_it_open(folder, tmp_path):
    (folder / "modules.json").unlink()
    with Llama(convert(folder, tmp_path / "model.gguf")) as llama:
        assert llama.model.pooling_type == PoolingType.UNSPECIFIED
        assert llama.pooling_type == PoolingType.MEAN


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
