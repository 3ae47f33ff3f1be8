"""The layout: what is given, what was measured, what is guessed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DATA, TEXTS

from llamacrab import Llama, Model, _engine, tuning
from llamacrab._core import Scheduler, Tokenization
from llamacrab.errors import ContextError
from llamacrab.tuning import Layout, measure

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
    assert tuning.best_pack(0, b, c, least=96, most=512) == 96


def test_explicit_sizes_win_over_what_was_measured():
    with Model(PATH) as model:
        tuning.remember(model, False, Layout(3, 5, 320, False), n_packs=9, noise=0.1)
        measured = f"measured on {tuning.recall(model, False)}"
    assert measured.endswith("9 packs, noise 10%")
    with Llama(PATH) as llama:
        assert llama.layout == Layout(3, 5, 320, False)
        assert set(llama.layout_sources.values()) == {measured}
    with Llama(PATH, pack_tokens=64, flash_attn=True) as llama:
        assert llama.layout == Layout(3, 5, 64, True)
        assert list(llama.layout_sources.values()) == [measured, measured, "given", "given"]
    with Llama(PATH, n_contexts=1, n_threads=1) as llama:
        assert llama.layout == Layout(1, 1, 320, False)
    with Llama(PATH, n_contexts=1) as llama:
        assert list(llama.layout_sources.values()) == ["given", "guess", measured, measured]


def test_cpus_are_a_budget_of_all_contexts():
    with Llama(PATH, n_cpus=1) as llama:
        assert (llama.layout.n_contexts, llama.layout.n_threads) == (1, 1)
        assert len(llama.stats()["workers"]) == 1
        assert llama.layout_sources["n_contexts"] == llama.layout_sources["n_threads"] == "given"
    with Llama(PATH, n_cpus=3) as llama:
        assert (llama.layout.n_contexts, llama.layout.n_threads) == (3, 1)
    with Llama(PATH, n_cpus=4, n_contexts=2) as llama:
        assert llama.layout.n_threads == 2
    with Llama(PATH, n_cpus=4, n_threads=4) as llama:
        assert llama.layout.n_contexts == 1
    with Llama(PATH, n_cpus=4, devices=["CPU", "CPU"]) as llama:
        assert [layout.n_contexts for layout in llama.layouts] == [2, 2]
    with Model(PATH) as model:
        tuning.remember(model, False, Layout(3, 5, 320, True))
    with Llama(PATH, n_cpus=2) as llama:
        assert llama.layout == Layout(2, 1, 320, True)
    for wrong in ({"n_cpus": -1}, {"n_cpus": 2, "n_contexts": 3}, {"n_cpus": 2, "n_threads": 4}):
        with pytest.raises(ContextError, match="n_cpus"):
            Llama(PATH, **wrong)


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
def test_a_long_job_keeps_the_size_of_its_packs_and_nothing_that_was_given(monkeypatch, way):
    monkeypatch.setattr(tuning.Calibration, "PACKS_EACH", 1)
    monkeypatch.setattr(_engine, "TEXTS_PER_STEP", 32)
    many = TEXTS * 12
    given = {"n_contexts": 1, "n_threads": 1, "flash_attn": False, "queue_tokens": 2048}
    with Llama(PATH, cpu_backend="ggml", **given) as llama:
        if way == "embed_texts":
            llama.embed_texts(many, truncate=True, dedup=False)
        else:
            for _ in llama.embed_iter(many, truncate=True, dedup=False, batch_size=256):
                pass
        # Nothing was computed for the sake of it.
        assert sum(worker["texts"] for worker in llama.stats()["workers"]) == len(many)
        entry = tuning.recall(llama.model, False)
        assert 64 <= entry.layout.pack_tokens <= 512
        assert entry.layout == Layout(0, 0, llama.layout.pack_tokens, "auto")
        assert entry.n_packs >= 7
        assert llama.layout_sources["pack_tokens"] == f"measured on {entry}"
    with Llama(PATH, cpu_backend="ggml") as llama:
        unmeasured = tuning.guess(on_gpu=False, given=Layout())
        assert llama.layout == replace(unmeasured, pack_tokens=entry.layout.pack_tokens)


def test_a_long_job_leaves_what_tune_found_of_contexts_and_threads():
    with Model(PATH) as model:
        tuning.remember(model, False, Layout(3, 5, 320, False), noise=0.9)
        entry = tuning.remember_pack(model, False, 128, n_packs=50, noise=0.1)
        assert entry.layout == Layout(3, 5, 128, False)
        assert tuning.recall(model, False) == entry
        # One that was quieter, and is not old, stays.
        assert tuning.remember_pack(model, False, 64, n_packs=50, noise=0.2) == entry


def test_what_is_noisy_or_old_or_of_another_version_is_measured_again(tmp_path):
    with Model(PATH) as model:
        for change, due in (
            ({}, False),
            ({"noise": 0.6}, True),
            ({"noise": math.inf}, True),
            ({"measured": "2020-01-31"}, True),
            ({"version": "0.0.1"}, True),
        ):
            tuning.remember(model, False, Layout(0, 0, 64), n_packs=300, noise=0.05)
            stored = json.loads((tmp_path / "tuning.json").read_text())
            next(iter(stored.values())).update(change)
            (tmp_path / "tuning.json").write_text(json.dumps(stored))
            assert tuning.recall(model, False).is_due() == due
            with Llama(PATH) as llama:
                assert llama.layout.pack_tokens == 64
                assert (llama._engine._calibration is not None) == due
    # A quieter one gives way to a new one where it is old.
    with Model(PATH) as model:
        assert tuning.remember_pack(model, False, 96, n_packs=9, noise=9).layout.pack_tokens == 96


@pytest.mark.parametrize(
    "old",
    [
        {"n_contexts": 1, "n_threads": 1, "pack_tokens": 32, "flash_attn": False},
        {"layout": {"n_contexts": -1}, "measured": "2026-01-31", "version": "1"},
        {"layout": {"pack_tokens": 64}, "measured": "soon", "version": "1"},
        {"layout": {"pack_tokens": 64}, "measured": "2026-01-31", "version": "1", "more": 1},
        {"layout": 3},
        None,
        [],
    ],
)
def test_files_of_other_versions_are_passed_over(tmp_path, old):
    with Model(PATH) as model:
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps({tuning.key(model, False): old, "other": 1}))
        assert tuning.remembered(model, False) is None
        with Llama(PATH) as llama:
            assert set(llama.layout_sources.values()) == {"guess"}
        tuning.remember(model, False, Layout(1, 1, 64))
        assert tuning.remembered(model, False) == Layout(1, 1, 64)
        assert json.loads(path.read_text())["other"] == 1


class PacedScheduler:
    """Stands for a scheduler whose packs take the time that a test says."""

    def __init__(self, seconds, n_ubatch=4096, pack_tokens=192):
        self.context = SimpleNamespace(n_ubatch=n_ubatch, n_threads=2)
        self.n_contexts, self.pack_tokens = 1, pack_tokens
        self.seconds, self.tried, self.made = seconds, [], []

    def work(self):
        n = self.pack_tokens
        self.tried.append(n)
        self.made += [(n, 2, self.seconds(n, len(self.made) + i)) for i in range(8)]
        self.made.append((n, 4, self.seconds(n, 0) / 2))  # with the threads of an idle worker

    def stats(self):
        return {"workers": [{"packs": len(self.made)}]}

    def recent_packs(self):
        kinds = [("n_tokens", np.int32), ("n_threads", np.int32), ("seconds", float)]
        return np.array(self.made, dtype=kinds)


def calibrated(scheduler):
    calibration = tuning.Calibration(scheduler)
    while (found := calibration.step()) is None:
        scheduler.work()
    return calibration, found


def test_a_calibration_stays_within_what_it_measured():
    growing = PacedScheduler(lambda n, _: 1e-3 + 1e-5 * n)
    assert calibrated(growing)[1] == 512 == max(growing.tried)  # not the 4096 that would fit
    small = PacedScheduler(lambda n, _: 1e-8 * n**2)
    assert calibrated(small)[1] == 64 == min(small.tried)
    tiny = PacedScheduler(lambda n, _: 1e-3, n_ubatch=40, pack_tokens=40)
    assert calibrated(tiny)[1] == 40


def test_a_calibration_holds_out_for_a_quiet_machine():
    quiet = PacedScheduler(lambda n, _: 1e-3 + 1e-5 * n + 5e-8 * n**2)
    calibration, found = calibrated(quiet)
    assert found == pytest.approx(np.sqrt(1e-3 / 5e-8), abs=8)
    assert calibration.noise < 0.05
    # At first every other pack takes ten times as long, then something else has ended.
    busy = PacedScheduler(lambda n, i: quiet.seconds(n, i) * (10 if i < 150 and i % 2 else 1))
    calibration, found = calibrated(busy)
    assert len(busy.tried) > len(quiet.tried)
    assert found == pytest.approx(np.sqrt(1e-3 / 5e-8), rel=0.2)
    assert calibration.noise <= 0.25
    # It does not end: what was found is marked as doubtful.
    loud = PacedScheduler(lambda n, i: quiet.seconds(n, i) * (1 + i % 7))
    calibration, found = calibrated(loud)
    assert 64 <= found <= 512
    assert calibration.noise > 0.25


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
        texts = [text[:60] for text in TEXTS] * 5  # so that no worker comes too late
        job = scheduler.job(encoder, len(texts), dedup=False)
        job.add(texts)
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
    monkeypatch.setattr(measure, "PACKS_CPU", (64, 128, 256))
    seen = []
    with Model(PATH, cpu_backend="ggml") as model:
        found = tuning.tune(model, n_tokens=4, seconds=0, report=seen.append)
    assert seen == found.table
    assert found.best == max(found.table, key=lambda one: one.tokens_per_second).layout
    assert {one.layout.pack_tokens for one in found.table} == {64, 128, 256}
    assert {one.layout.flash_attn for one in found.table} == {True, False}
    ours = tuning.layouts(on_gpu=False, cpu_backend="llamacrab")  # which have flash attention only
    assert {layout.flash_attn for layout in ours} == {True}
    assert {one.layout.n_contexts for one in found.table} >= {1, tuning.usable_cpus()}
