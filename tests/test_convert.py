"""llamacrab.convert gives the GGUF that llama.cpp's own converter gives."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy
from helpers import DATA, TEXTS, cosines, gguf_path, golden

from llamacrab import Llama, convert, errors

FOLDER = DATA / "tiny-bert-hf"
# The converter also writes what a model card says, and sizes that it estimates.
KEPT = ("bert.", "tokenizer.")


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


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


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
            "has a classification head",
        ),
        (lambda f: edit(f, "config.json", vocab_size=3), "its config says 3"),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), "lacks \\[CLS\\]"),
    ],
)
def test_a_folder_that_cannot_be_converted_says_why_and_leaves_nothing(
    folder, tmp_path, damage, message
):
    damage(folder)
    out = tmp_path / "out"
    with pytest.raises(errors.ConvertError, match=message):
        convert(folder, out / "model.gguf")
    assert not out.exists() or not list(out.iterdir())


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(errors.ConvertError, match="outtype must be one of"):
        convert(FOLDER, tmp_path / "model.gguf", outtype="q4_0")
