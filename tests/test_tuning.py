"""The layout: what is given, what was measured, what is guessed."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import DATA, TEXTS

from llamacrab import Llama, Model, tuning
from llamacrab._core import Scheduler, Tokenization
from llamacrab.tuning import Layout

PATH = DATA / "tiny-bert.gguf"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path))


def packs(a, b, c, sizes, noise=0.0):
    rng = np.random.default_rng(0)
    n = np.repeat(sizes, 20)
    seconds = (a + b * n + c * n**2) * (1 + noise * rng.random(len(n)))
    rows = zip(np.ones_like(n), n, seconds, strict=True)
    kinds = [("n_texts", np.int32), ("n_tokens", np.int32), ("seconds", float)]
    return np.array(list(rows), dtype=kinds)


@pytest.mark.parametrize("truth", [(1e-3, 5e-5, 2e-8), (0, 5e-5, 0), (2e-3, 0, 1e-7)])
def test_the_fit_finds_the_cost_that_made_the_packs(truth):
    found = tuning.fit(packs(*truth, sizes=[64, 128, 256, 512]))
    assert found == pytest.approx(truth, rel=1e-6, abs=1e-12)


def test_the_fit_is_never_negative_and_stands_noise():
    a, b, c = tuning.fit(packs(1e-3, 5e-5, 2e-8, sizes=np.arange(20, 500, 3), noise=0.2))
    assert min(a, b, c) >= 0
    assert b == pytest.approx(5e-5, rel=0.3)


def test_the_best_pack_has_the_least_seconds_a_token():
    a, b, c = 1e-3, 5e-5, 2e-8
    best = tuning.best_pack(a, b, c, most=4096)
    n = np.arange(8, 4096)
    assert best == pytest.approx(n[np.argmin(a / n + b + c * n)], abs=8)
    assert tuning.best_pack(a, b, 0, most=512) == 512
    assert tuning.best_pack(a, b, c, most=100) == 100


def test_explicit_sizes_win_over_what_was_measured():
    with Model(PATH) as model:
        tuning.remember(model, False, Layout(3, 5, 320, False))
    with Llama(PATH) as llama:
        assert llama.layout == Layout(3, 5, 320, False)
    with Llama(PATH, pack_tokens=64, flash_attn=True) as llama:
        assert llama.layout == Layout(3, 5, 64, True)
    with Llama(PATH, n_contexts=1, n_threads=1) as llama:
        assert llama.layout == Layout(1, 1, 320, False)


def test_what_was_measured_holds_for_that_model_only(tmp_path):
    changed = tmp_path / "changed.gguf"
    data = bytearray(PATH.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    with Model(PATH) as model, Model(changed) as other:
        tuning.remember(model, False, Layout(1, 1, 320, "auto"))
        assert tuning.remembered(model, False) == Layout(1, 1, 320, "auto")
        assert tuning.remembered(other, False) is None
        assert tuning.remembered(model, True) is None


def test_a_damaged_memory_is_ignored_and_written_anew(tmp_path):
    (tmp_path / "tuning.json").write_text("{not json")
    with Model(PATH) as model:
        assert tuning.remembered(model, False) is None
        tuning.remember(model, False, Layout(1, 1, 64, "auto"))
        assert tuning.remembered(model, False) == Layout(1, 1, 64, "auto")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path / "file"))
    with Model(PATH) as model:
        tuning.remember(model, False, Layout(1, 1, 64, "auto"))
        assert tuning.remembered(model, False) is None


@pytest.mark.parametrize("way", ["embed_texts", "embed_iter"])
def test_a_large_job_finds_and_remembers_its_pack_and_computes_nothing_else(way):
    many = TEXTS * 250
    with Llama(PATH, n_contexts=2, n_threads=1) as llama:
        if way == "embed_texts":
            llama.embed_texts(many, truncate=True, dedup=False)
        else:
            for _ in llama.embed_iter(many, truncate=True, dedup=False, batch_size=256):
                pass
        assert sum(worker["texts"] for worker in llama.stats()["workers"]) == len(many)
        remembered = tuning.remembered(llama.model, False)
        assert remembered == llama.layout
        assert 32 <= remembered.pack_tokens <= 512
    with Llama(PATH) as llama:
        assert llama.layout == remembered


def test_a_device_has_a_measurement_of_its_own_and_packs_of_its_own_size():
    with Model(PATH, device="cpu") as model, Model(PATH) as anywhere:
        tuning.remember(model, False, Layout(2, 1, 64, True))
        assert tuning.remembered(anywhere, False) is None
    with Llama(PATH, devices=["CPU", "CPU"]) as llama:
        assert [layout.pack_tokens for layout in llama.layouts] == [64, 64]
        expected = llama.embed_texts(TEXTS, truncate=True)
    # As if they were different devices.
    how = {"n_ctx": 128, "n_batch": 512, "n_ubatch": 512, "n_seq_max": 64, "n_threads": 1}
    with Model(PATH) as model, Model(PATH) as other:
        small = {"n_contexts": 2, "pack_tokens": 32, "n_seq_max": 4}
        how |= {"n_contexts": 1, "pack_tokens": 300}
        scheduler = Scheduler(model, replicas=[(other, small)], **how)
        encoder = Tokenization(model.vocab, limit=128)
        job = scheduler.job(encoder, len(TEXTS), dedup=False)
        job.add([text[:60] for text in TEXTS])
        job.seal()
        job.wait()
        packs = scheduler.recent_packs()
        scheduler.close()
    large = packs[packs["worker"] == 0]
    rest = packs[packs["worker"] != 0]
    assert len(np.unique(rest["worker"])) == 2
    assert large["n_tokens"].max() > 64
    assert rest["n_texts"].max() <= 4
    assert rest[rest["n_texts"] > 1]["n_tokens"].max() <= 32
    assert len(expected) == len(TEXTS)


def test_a_small_job_measures_nothing():
    with Llama(PATH) as llama:
        before = llama._scheduler.pack_tokens
        llama.embed_texts(TEXTS, truncate=True)
        assert llama._scheduler.pack_tokens == before
        assert tuning.remembered(llama.model, False) is None


def test_tune_tries_every_layout_and_picks_the_fastest(monkeypatch):
    # Few sizes: two threads that share a pack crawl where something else wants the CPUs.
    monkeypatch.setattr(tuning, "PACKS_CPU", (64, 128, 256))
    seen = []
    with Model(PATH, cpu_backend="ggml") as model:
        found = tuning.tune(model, seconds=0.01, report=seen.append)
    assert seen == found.table
    assert found.best == max(found.table, key=lambda one: one.tokens_per_second).layout
    assert {one.layout.pack_tokens for one in found.table} == set(tuning.PACKS_CPU)
    assert {one.layout.flash_attn for one in found.table} == {True, False}
    ours = tuning.layouts(on_gpu=False, cpu_backend="llamacrab")  # which have flash attention only
    assert {layout.flash_attn for layout in ours} == {True}
    assert {one.layout.n_contexts for one in found.table} >= {1, tuning.usable_cpus()}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_cgroup_quota_is_respected(tmp_path, files, cpus):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert tuning.cgroup_cpus(tmp_path) == cpus


def test_affinity_is_respected():
    import os

    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert tuning.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
