"""The bench: what it finds, what it calls slower, and what it must not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers import gguf_path
from test_cli import run as cli

from llamacrab.bench import report, statistics, workloads
from llamacrab.bench import run as bench
from llamacrab.errors import BenchError

MODEL = str(gguf_path("tiny-bert"))
# Its bench starts faster: an embedder first finds the size of its packs.
RERANKER = str(gguf_path("tiny-bert-rank"))
QUICK = {"rounds": 3, "seconds": 0.02}


def test_workloads_are_always_the_same_and_as_long_as_they_say(monkeypatch, tmp_path):
    for folder in (workloads.WORDNET, tmp_path / "none"):
        monkeypatch.setattr(workloads, "WORDNET", folder)
        assert workloads.short(100) == workloads.short(100)
        assert len(set(workloads.short(100))) == 100
        words = [len(text.split()) for text in workloads.mixed(300)]
        assert min(words) < 20 < 200 < max(words) <= 380
        assert {len(text.split()) for text in workloads.long(5)} == {380}
    assert workloads.source() == "made-up sentences"


def test_a_bench_of_an_embedder_measures_every_case():
    result = bench.run(MODEL, **QUICK)
    [side] = result["sides"]
    assert list(side["cases"]) == [
        "load", "tokenize", "one by one", "8 threads", "short", "mixed", "long",
    ]  # fmt: skip
    for name, case in side["cases"].items():
        assert len(case["rates"]) == len(case["gemm"]) == QUICK["rounds"]
        assert min(case["rates"]) > 0
        assert (case["n_tokens"] > 0) == (name != "load")
        if case["latency_ms"]:
            assert 0 < case["latency_ms"]["p50"] <= case["latency_ms"]["p99"]
    assert {name for name, case in side["cases"].items() if case["latency_ms"]} == {
        "one by one",
        "8 threads",
    }
    assert side["peak_rss"] is None or side["peak_rss"] > 2**20
    assert json.loads(json.dumps(result)) == result
    lines = report.table(result).splitlines()
    assert any(line.startswith("short ") for line in lines)


def test_the_table_shows_the_median_of_an_even_number_of_rounds():
    case = {"rates": [1000.0, 4000.0, 2000.0, 1.0], "n_tokens": 0, "latency_ms": None}
    layout = {"n_contexts": 1, "n_threads": 1, "pack_tokens": 64}
    about = {"model": "m.gguf", "desc": "a model", "layout": layout}
    side = {"label": "this", "about": about, "peak_rss": None, "cases": {"load": case}}
    result = {"machine": {"cpu": "a CPU", "cpus": 1}, "texts": "texts", "sides": [side]}
    *_, row = report.table(result).splitlines()
    assert row.split() == ["load", "1,500.0", "1.0", "4,000.0"]


def test_a_bench_of_a_reranker_measures_pairs():
    result = bench.run(RERANKER, **QUICK)
    assert list(result["sides"][0]["cases"]) == ["load", "tokenize", "rerank"]


def test_two_sides_are_compared_round_by_round(tmp_path):
    other = tmp_path / "other.gguf"
    shutil.copyfile(MODEL, other)
    result = bench.run(MODEL, against=other, cases=["short"], **QUICK)
    assert [side["label"] for side in result["sides"]] == ["this", str(other)]
    ratios = bench.compare(result, None)
    assert list(ratios) == ["short"]
    a, b = (side["cases"]["short"]["rates"] for side in result["sides"])
    assert ratios["short"].value == pytest.approx(np.median(np.divide(a, b)))
    assert report.table(result, ratios).splitlines()[-1].startswith("short ")


def test_a_bench_is_drawn_with_a_bar_for_each_side(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    result = bench.run(MODEL, against=MODEL, cases=["short", "long"], **QUICK)
    report.plot(result, tmp_path / "bench.svg")
    drawn = (tmp_path / "bench.svg").read_text()
    assert all(
        f"<!-- {text} -->" in drawn for text in ("short", "long", "this", "tokens per second")
    )


def faked(rates, gemm):
    case = {"rates": rates, "gemm": gemm, "n": 1, "n_tokens": 1}
    return {
        "version": bench.VERSION,
        "texts": "texts",
        "machine": {"cpu": "cpu"},
        "sides": [{"label": "x", "cases": {"short": case}}],
    }


def test_only_what_is_slower_both_as_it_is_and_for_the_machine_is_slower():
    old = faked([100, 102, 98, 101, 99], [10.0] * 5)
    slow = faked([80, 81, 79, 80, 82], [10.0] * 5)
    assert bench.compare(slow, old)["short"].is_below(0.95)
    busy = faked([50, 51, 49, 50, 52], [5.0] * 5)  # the machine is half as fast
    assert not bench.compare(busy, old)["short"].is_below(0.95)
    calm = faked([100, 101, 99, 100, 98], [20.0] * 5)  # only the reference is faster
    assert not bench.compare(calm, old)["short"].is_below(0.95)
    with pytest.raises(BenchError, match="for another texts"):
        bench.compare(slow, {**old, "texts": "others"})


def test_what_looks_slower_once_must_look_so_each_time():
    low, equal = statistics.Ratio(0.8, 0.7, 0.9), statistics.Ratio(0.97, 0.9, 1.1)
    asked = []

    def again(names):
        asked.append(names)
        now = {"a": low, "b": equal if len(asked) == 1 else low}
        return {name: now[name] for name in names}

    assert bench.slower({"a": low, "b": low, "c": equal}, 0.95, again) == {"a": low}
    assert asked == [["a", "b"], ["a"]]


def test_intervals_hold_the_ratio_that_samples_were_made_with():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        drift = rng.lognormal(0, 0.3, 9)
        a, b = drift * rng.lognormal(0, 0.05, 9), drift * 1.25 * rng.lognormal(0, 0.05, 9)
        found = statistics.paired(a, b)
        held += found.low <= 0.8 <= found.high
    assert held >= 170  # of a median of nine: less than the 190 of large samples


def test_a_run_that_is_slower_than_an_old_one_fails_and_an_equal_one_does_not(tmp_path):
    # Bounds so wide that no noise of a busy machine reaches them: bench/ has the narrow ones.
    common = ("bench", RERANKER, "--case", "tokenize", "--rounds", "3", "--seconds", "0.05")
    before = tmp_path / "before.json"
    done = cli(*common, "--json", before)
    assert done.returncode == 0, done.stderr
    again = cli(*common, "--compare", before, "--fail-under", "0.1")
    assert again.returncode == 0, again.stderr
    held = json.loads(before.read_text())
    case = held["sides"][0]["cases"]["tokenize"]
    case["rates"] = [200 * rate for rate in case["rates"]]
    before.write_text(json.dumps(held))
    slower = cli(*common, "--compare", before, "--fail-under", "0.1")
    assert slower.returncode == 1
    assert "slower than 0.1: tokenize: 0.0" in slower.stderr


def test_what_a_bench_cannot_do_is_said():
    assert "exclude each other" in cli("bench", "--against", "x", "--compare", __file__).stderr
    assert "needs something to compare with" in cli("bench", "--fail-under", "0.9").stderr
    done = cli("bench", RERANKER, "--case", "nonsense", "--seconds", "0.02")
    assert "no case nonsense; there are load, tokenize" in done.stderr
    done = cli("bench", RERANKER, "--against", "no-such.gguf", "--seconds", "0.02")
    assert "no-such.gguf: ModelNotFoundError" in done.stderr
    assert done.returncode == 1
