"""What must hold on a GPU, of whatever kind this build has: Vulkan, CUDA, Metal.

Skipped where there is none. Mesa's software Vulkan counts as one: `bench/gpu/vulkan.sh` builds for
it and runs this file.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers import CAUSAL, EMBEDDERS, RERANKERS, TEXTS, check_python, cosines, gguf_path

from llamacrab import Context, Llama, Model, tuning
from llamacrab._core import devices
from llamacrab.errors import AllocationError
from llamacrab.tuning import measure

GPUS = [device["name"] for device in devices() if device["type"] in ("GPU", "IGPU")]
pytestmark = pytest.mark.skipif(not GPUS, reason="this build and machine have no GPU")

SOME = TEXTS[:40]


def rows(name, texts=SOME, **how):
    with Llama(gguf_path(name), **how) as llama:
        return llama.embed_texts(texts, truncate=True)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_rows_are_those_of_the_cpu(name):
    found, expected = rows(name, devices=GPUS[:1]), rows(name, devices=["CPU"])
    assert cosines(found, expected).min() > 0.999


@pytest.mark.parametrize("name", ["tiny-bert", *CAUSAL[:1]])
def test_packed_equals_alone(name):
    packed = rows(name, devices=GPUS[:1])
    alone = rows(name, devices=GPUS[:1], deterministic=True)
    assert cosines(packed, alone).min() > 0.999


@pytest.mark.parametrize("name", RERANKERS)
def test_scores_are_those_of_the_cpu(name):
    scores = []
    for device in (GPUS[0], "CPU"):
        with Llama(gguf_path(name), devices=[device]) as llama:
            scores.append(llama.rerank("who eats crabs", SOME, truncate=True))
    np.testing.assert_allclose(*scores, atol=0.05)


def test_the_weights_lie_where_they_were_asked_to():
    def free():
        return next(d["memory_free"] for d in devices() if d["name"] == GPUS[0])

    before = free()
    with Model(gguf_path("tiny-bert"), device=GPUS[0]) as model, Context(model, n_ctx=64):
        assert free() <= before


def test_a_gpu_and_a_cpu_share_a_job():
    expected = rows("tiny-bert", TEXTS, devices=["CPU"])
    with Llama(gguf_path("tiny-bert"), devices=[GPUS[0], "CPU"], pack_tokens=64) as llama:
        found = llama.embed_texts(TEXTS, truncate=True)
        workers = llama.stats()["workers"]
    assert len(workers) >= 2
    assert all(worker["packs"] for worker in workers)
    assert cosines(found, expected).min() > 0.999


def test_too_large_a_context_raises_and_the_process_goes_on():
    with Model(gguf_path("tiny-qwen3"), device=GPUS[0]) as model:
        with pytest.raises(AllocationError, match="n_ubatch=1048576"):
            Context(model, n_ctx=64, n_ubatch=2**20)
        with Context(model, n_ctx=64) as context:
            assert context.n_ctx >= 64


def test_tuning_measures_packs_of_a_gpus_size(monkeypatch):
    # Without flash attention large packs crash Mesa 22.3's software driver, in a thread of its own.
    monkeypatch.setattr(measure, "layouts", lambda *_: [tuning.Layout(1, 1, 0, True)])
    monkeypatch.setattr(measure, "PACKS_GPU", (256, 1024))
    with Model(gguf_path("tiny-bert"), device=GPUS[0]) as model:
        found = tuning.tune(model, on_gpu=True, seconds=0.01)
    assert max(one.layout.pack_tokens for one in found.table) > 512


def test_the_default_is_the_gpu():
    said = check_python(
        "import sys, logging; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "from llamacrab import Llama\n"
        "logging.getLogger('llamacrab').setLevel(logging.DEBUG)\n"
        "with Llama(sys.argv[1]) as llama: llama.embed('a crab')",
        gguf_path("tiny-bert"),
    )
    assert f"{GPUS[0]} model buffer size" in said or "offloaded" in said
