"""A `Llama` goes to another process as its file and its arguments; a copy of it is itself."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest
from helpers import gguf_path

from llamacrab import Llama, Model, PoolingType, SplitMode, errors

TEXTS = ["a crab", "a lobster"]
HOW = {
    "n_ctx": 64,
    "pack_tokens": 96,
    "n_contexts": 1,
    "n_threads": 1,
    "n_gpu_layers": 0,
    "split_mode": SplitMode.NONE,
    "devices": ["CPU"],
    "pooling_type": PoolingType.CLS,
    "flash_attn": False,
    "use_mmap": False,
    "cpu_backend": "ggml",
    "deterministic": True,
    "on_pack": print,
}


class Own(Llama):
    """A subclass, as applications make them."""


@pytest.mark.parametrize("kind", [Llama, Own])
def test_a_llama_comes_back_with_what_it_was_made_with(kind):
    with kind(gguf_path("tiny-bert"), **HOW) as llama:
        with pickle.loads(pickle.dumps(llama)) as other:
            assert type(other) is kind
            assert other is not llama
            assert other._given == llama._given
            assert (other.n_ctx, other.pooling_type, other.layouts) == (
                llama.n_ctx,
                llama.pooling_type,
                llama.layouts,
            )
            np.testing.assert_array_equal(other.embed_texts(TEXTS), llama.embed_texts(TEXTS))
        assert llama.embed_texts(TEXTS).shape == (2, 32)


def test_what_is_pickled_is_small_and_holds_no_choice_of_this_machine(load):
    data = pickle.dumps(load("tiny-bert"))
    assert len(data) < 2000
    with pickle.loads(data) as other:
        assert other._given["n_contexts"] == other._given["n_threads"] == 0


def test_a_relative_path_is_of_the_folder_that_it_was_given_in(tmp_path, monkeypatch):
    shutil.copy(gguf_path("tiny-bert"), tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    with Llama("model.gguf") as llama, Model("model.gguf") as model:
        monkeypatch.chdir(os.sep)
        pickle.loads(pickle.dumps(llama)).close()
        pickle.loads(pickle.dumps(model)).close()


def test_the_default_model_is_the_default_model_there_too(minilm):
    assert pickle.loads(pickle.dumps(minilm.__reduce__()))[1] == (None,)


def test_a_spawned_process_takes_a_llama_as_an_argument(load):
    llama = load("tiny-bert")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(Llama.embed_texts, (llama, TEXTS))
        pool.close()
        pool.join()
    np.testing.assert_allclose(rows, llama.embed_texts(TEXTS), atol=1e-6)


def test_a_model_comes_back_with_what_it_was_made_with():
    how = {"n_gpu_layers": 0, "device": "CPU", "use_mmap": False, "cpu_backend": "ggml"}
    with (
        Model(gguf_path("tiny-bert"), **how) as model,
        pickle.loads(pickle.dumps(model)) as other,
    ):
        assert other is not model
        assert (other.path, other.device, other.cpu_backend) == (model.path, "CPU", "ggml")
        assert other.__reduce__()[0].keywords == model.__reduce__()[0].keywords


def test_what_is_closed_is_not_pickled():
    llama, model = Llama(gguf_path("tiny-bert")), Model(gguf_path("tiny-bert"))
    llama.close()
    model.close()
    for closed in (llama, model):
        with pytest.raises(errors.ClosedError, match="closed"):
            pickle.dumps(closed)


def test_a_callback_that_cannot_be_pickled_is_named():
    with (
        Llama(gguf_path("tiny-bert"), on_pack=lambda pack: None) as llama,
        pytest.raises(errors.InputError, match=r"on_pack=<function .*<lambda>.* cannot be"),
    ):
        pickle.dumps(llama)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_is_the_same_model(load, duplicate):
    llama = load("tiny-bert")
    assert duplicate(llama) is llama
    assert duplicate(llama.model) is llama.model
    assert duplicate({"llama": llama})["llama"] is llama
