"""The scheduler: shared packs, futures, cancelling, failing and closing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter

import numpy as np
import pytest
from gguf.quants import dequantize
from helpers import DATA, TEXTS, Reader, cosines, rewrite_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacrab import Llama, Model, PoolingType, _core, fetch_default_model
from llamacrab._core import Scheduler, Tokenization
from llamacrab.errors import (
    AllocationError,
    ClosedError,
    DecodeError,
    LlamaTimeoutError,
    NumericalError,
    QueueFull,
    TextTooLongError,
)

LIMIT = 128


@pytest.fixture(scope="module")
def tiny():
    with Llama(DATA / "tiny-bert.gguf", n_contexts=2, n_threads=1, pack_tokens=192) as llama:
        yield llama


@pytest.fixture(scope="module")
def expected(tiny):
    """Rows computed one by one: what every way through the scheduler must give."""
    return np.array([tiny.embed(text, truncate=True) for text in TEXTS])


def test_threads_that_embed_at_once_get_their_own_rows(tiny, expected):
    failures = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(8):
            chosen = [rng.randrange(len(expected)) for _ in range(rng.choice([1, 1, 3, 40, 200]))]
            rows = tiny.embed_texts([TEXTS[i] for i in chosen], truncate=True)
            if cosines(rows, expected[chosen]).min() < 0.9999:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(_core.kernels() is None, reason="the kernels are not in this build")
def test_a_lone_text_gets_the_threads_of_idle_workers():
    model = fetch_default_model("bf16")
    text = " ".join(TEXTS[:12])
    with Llama(model, cpu_backend="llamacrab", n_contexts=1, n_threads=1) as llama:
        wanted = llama.embed(text, truncate=True)
        assert set(llama.recent_packs()["n_threads"]) == {1}
    with Llama(model, cpu_backend="llamacrab", n_contexts=3, n_threads=2) as llama:
        deadline = time.monotonic() + 60
        while 6 not in llama.recent_packs()["n_threads"]:
            np.testing.assert_array_equal(llama.embed(text, truncate=True), wanted)
            assert time.monotonic() < deadline
    with Llama(model, cpu_backend="ggml", n_contexts=2, n_threads=1) as llama:
        llama.embed(text, truncate=True)
        assert set(llama.recent_packs()["n_threads"]) == {1}


def test_texts_of_many_threads_share_packs(tiny):
    before = tiny.stats()
    barrier = threading.Barrier(16)

    def work():
        barrier.wait()
        for _ in range(20):
            tiny.embed("a crab walks along the shore")

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = tiny.stats()
    n_texts, n_packs = (
        sum(worker[name] for worker in after["workers"])
        - sum(worker[name] for worker in before["workers"])
        for name in ("texts", "packs")
    )
    assert n_texts == 320
    assert n_packs < n_texts


def test_a_stream_comes_in_order_and_reads_no_further_than_it_must(tiny, expected):
    taken = []

    def source():
        for i, text in enumerate(TEXTS):
            taken.append(i)
            yield text

    stream = tiny.embed_iter(source(), truncate=True, batch_size=8)
    first = next(stream)
    assert first.shape == (8, tiny.n_embd)
    assert len(taken) <= 4 * 8
    rows = np.concatenate([first, *stream])
    assert cosines(rows, expected).min() > 0.9999


def test_leaving_a_stream_early_leaves_nothing_behind(tiny):
    stream = tiny.embed_iter(TEXTS * 10, truncate=True, batch_size=16)
    next(stream)
    stream.close()
    assert tiny.stats()["queued_texts"] == 0


def test_an_error_in_a_stream_says_where(tiny):
    stream = tiny.embed_iter(["short"] * 40 + ["long " * 500], batch_size=16)
    with pytest.raises(TextTooLongError, match="text 40 has"):
        list(stream)


def test_futures_resolve_to_the_rows(tiny, expected):
    futures = [tiny.submit(text, truncate=True) for text in TEXTS]
    rows = np.array([future.result(timeout=60) for future in futures])
    assert cosines(rows, expected).min() > 0.9999
    assert tiny.submit(TEXTS[:5], truncate=True).result(timeout=60).shape == (5, tiny.n_embd)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32])
def test_a_list_of_ids_is_one_text_whatever_its_integers(tiny, kind):
    ids = [kind(2), kind(7), kind(3)]
    assert np.array_equal(tiny.submit(ids).result(timeout=60), tiny.embed(ids))


def test_a_cancelled_future_drops_its_texts_and_disturbs_nobody(tiny, expected):
    bulk = tiny.submit(TEXTS * 20, truncate=True, dedup=False)
    other = tiny.submit(TEXTS[:10], truncate=True)
    assert bulk.cancel()
    assert bulk.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        bulk.result()
    assert cosines(other.result(timeout=60), expected[:10]).min() > 0.9999
    assert not other.cancel()


def test_a_call_gives_up_at_its_timeout_and_keeps_what_it_has(tiny, expected):
    for timeout in (0.2, 1, 5):  # on a busy machine nothing may be done so soon
        with pytest.raises(LlamaTimeoutError) as info:
            tiny.embed_texts(TEXTS * 500, truncate=True, dedup=False, timeout=timeout)
        done = info.value.done
        if done.any():
            break
    assert 0 < done.sum() < len(done)
    again = np.tile(expected, (500, 1))[done]
    assert cosines(info.value.rows[done], again).min() > 0.9999
    assert tiny.stats()["queued_texts"] == 0


def test_asyncio_awaits_many_at_once(tiny, expected):
    async def run():
        rows = await asyncio.gather(*[tiny.aembed(text, truncate=True) for text in TEXTS])
        bulk = await tiny.aembed_texts(TEXTS, truncate=True)
        return np.array(rows), bulk

    for rows in asyncio.run(run()):
        assert cosines(rows, expected).min() > 0.9999


def test_a_cancelled_task_drops_its_texts(tiny):
    async def run():
        task = asyncio.create_task(tiny.aembed_texts(TEXTS * 5000, truncate=True, dedup=False))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        queued = tiny.stats()["queued_texts"]
        return queued, await tiny.aembed("still there")

    queued, row = asyncio.run(run())
    assert queued == 0
    assert row.shape == (tiny.n_embd,)


def test_a_full_queue_makes_producers_wait_or_raises():
    with Llama(DATA / "tiny-bert.gguf", n_contexts=1, n_threads=1, queue_tokens=256) as llama:
        long = ["crab " * 100] * 8
        futures = []

        def fill():
            for _ in range(1000):
                futures.append(llama.submit(long, truncate=True, dedup=False, block=False))

        with pytest.raises(QueueFull, match="tokens wait already"):
            fill()
        rows = llama.embed_texts(long * 20, truncate=True, dedup=False)
        assert len(rows) == 160
        assert all(future.result(timeout=60).shape == (8, 32) for future in futures)


def test_a_large_call_waits_for_no_more_than_those_that_came_before():
    # Room for one large text or eight small ones: it must not wait until nobody wants any.
    how = {"n_contexts": 1, "pack_tokens": 64, "n_ctx": 128, "n_ubatch": 128, "n_threads": 1}
    with Model(DATA / "tiny-bert.gguf") as model:
        scheduler = Scheduler(model, queue_tokens=128, **how)
        encoder = Tokenization(model.vocab, limit=128)
        n_small, stop = Counter(), threading.Event()

        def flood(number):
            while not stop.is_set() and n_small[number] < 20_000:
                job = scheduler.job(encoder, 1)
                job.add([[2, *[7 + number] * 14, 3]])
                n_small[number] += 1
                job.seal()
                if n_small[number] % 8 == 0:
                    job.wait()

        threads = [threading.Thread(target=flood, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        while n_small.total() < 100:
            time.sleep(0.001)
        job = scheduler.job(encoder, 40, dedup=False)
        before = n_small.total()
        for _ in range(40):
            job.add([[2, *[9] * 126, 3]])
        passed = n_small.total() - before
        stop.set()
        for thread in threads:
            thread.join()
        job.seal()
        assert job.wait().shape == (40, 32)
        scheduler.close()
    assert passed <= 40 * 6 * 3


def test_a_call_that_gives_up_waiting_lets_the_next_one_in():
    with Llama(DATA / "tiny-bert.gguf", n_cpus=1, queue_tokens=256) as llama:
        outcomes = Counter()

        def work(number):
            for _ in range(10):
                try:
                    llama.embed_texts(
                        ["crab " * 100] * 8, truncate=True, dedup=False, timeout=0.001 * number
                    )
                    outcomes["done"] += 1
                except LlamaTimeoutError:
                    outcomes["late"] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
        assert outcomes["late"] >= 10
        assert llama.embed_texts(["crab"] * 100, dedup=False, timeout=60).shape == (100, 32)
        assert llama.stats()["queued_tokens"] == 0


def test_a_text_that_can_never_fit_is_refused_at_admission(tiny):
    with pytest.raises(TextTooLongError, match=r"text 1 has 500 tokens .* 128 fit") as info:
        tiny.embed_texts(["short", [7] * 500])
    assert (info.value.limit, info.value.index) == (LIMIT, 1)


def test_equal_texts_are_computed_once_unless_told_otherwise(tiny, expected):
    for dedup, n_computed in ((True, 1), (False, 200)):
        before = sum(worker["texts"] for worker in tiny.stats()["workers"])
        rows = tiny.embed_texts([TEXTS[0]] * 200, truncate=True, dedup=dedup)
        computed = sum(worker["texts"] for worker in tiny.stats()["workers"]) - before
        assert computed == n_computed
        assert cosines(rows, np.tile(expected[0], (200, 1))).min() > 0.9999


def test_equal_texts_without_pooling_each_get_their_rows():
    with Llama(DATA / "tiny-bert.gguf", pooling_type=PoolingType.NONE) as llama:
        rows = llama.embed_texts(["a crab", "a lobster", "a crab"])
        assert rows[0].shape == rows[2].shape
        assert np.array_equal(rows[0], rows[2])
        assert not np.shares_memory(rows[0], rows[2])


def test_deterministic_rows_are_equal_to_the_last_bit():
    with Llama(DATA / "tiny-bert.gguf", deterministic=True) as llama:
        alone = np.array([llama.embed(text, truncate=True) for text in TEXTS])
        together = llama.embed_texts(TEXTS[::-1], truncate=True)[::-1]
        assert np.array_equal(alone, together)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("decode_error", DecodeError),
        ("no_memory", AllocationError),
        ("throws", DecodeError),
        ("not_finite", NumericalError),
    ],
)
def test_a_failing_pack_fails_only_its_call_and_the_next_works(tiny, expected, kind, error):
    tiny._scheduler._inject(kind, after=1, times=10_000)
    try:
        with pytest.raises(error) as info:
            tiny.embed_texts(TEXTS, truncate=True, dedup=False)
    finally:
        tiny._scheduler._inject("none")
    done = info.value.done
    assert not done.all()
    assert cosines(info.value.rows[done], expected[done]).min(initial=1) > 0.9999
    rows = tiny.embed_texts(TEXTS, truncate=True)
    assert cosines(rows, expected).min() > 0.9999


def test_a_pack_that_fails_once_is_tried_again_text_by_text(tiny, expected):
    tiny._scheduler._inject("decode_error", after=1, times=1)
    rows = tiny.embed_texts(TEXTS[:80], truncate=True, dedup=False)
    assert cosines(rows, expected[:80]).min() > 0.9999


def test_only_the_futures_whose_texts_fail_alone_too_are_lost(tiny, expected):
    tiny._scheduler._inject("throws", after=0, times=3)
    futures = [tiny.submit(text, truncate=True) for text in TEXTS]
    outcomes = Counter(type(future.exception(timeout=60)).__name__ for future in futures)
    assert 1 <= outcomes.pop("DecodeError") <= 3
    assert set(outcomes) == {"NoneType"}
    for future, row in zip(futures, expected, strict=True):
        if future.exception() is None:
            assert float(future.result() @ row) > 0.9999


# ------------------------------------------------------------------------- NaN of one text


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory):
    """Return a function that gives a tiny model in which one token is NaN, and a text with it."""
    folder = tmp_path_factory.mktemp("nan")
    made = {}

    def make(name):
        if name not in made:
            source = DATA / f"{name}.gguf"
            table = next(one for one in Reader(source).tensors if one.name == "token_embd.weight")
            values = dequantize(table.data, table.tensor_type).astype(np.float32)
            values[NAN_TOKEN] = np.nan
            made[name] = rewrite_gguf(
                source, folder / source.name, tensors={"token_embd.weight": values}
            )
        return made[name]

    return make


NAN_TOKEN = 77
BAD = [7, NAN_TOKEN, 9, 11]
GOOD = [[7 + i % 40 for i in range(n)] for n in range(3, 35)]


@pytest.mark.parametrize(
    ("name", "cpu_backend"),
    [("tiny-bert", "ggml"), ("tiny-bert", "auto"), ("tiny-qwen3", "ggml"), ("tiny-llama", "ggml")],
)
def test_a_text_whose_row_is_nan_fails_alone_and_leaves_nothing_behind(
    nan_model, name, cpu_backend
):
    how = {"n_contexts": 1, "n_threads": 1, "pack_tokens": 512, "cpu_backend": cpu_backend}
    with Llama(DATA / f"{name}.gguf", **how) as llama:
        expected = llama.embed_texts(GOOD)
    with Llama(nan_model(name), **how) as llama:
        for at in (0, 10, len(GOOD)):
            with pytest.raises(NumericalError, match=f"text {at} is") as info:
                llama.embed_texts([*GOOD[:at], BAD, *GOOD[at:]])
            assert info.value.index == at
            assert info.value.done.sum() == len(GOOD)
            rows = np.delete(info.value.rows, at, axis=0)
            assert cosines(rows, expected).min() > 0.9999
            assert cosines(llama.embed_texts(GOOD), expected).min() > 0.9999
        # Of several callers, only the one who brought it gets the error.
        futures = [llama.submit(ids) for ids in [*GOOD[:5], BAD, *GOOD[5:]]]
        failed = [k for k, future in enumerate(futures) if future.exception(timeout=60)]
        assert failed == [5]


def test_a_beginning_that_texts_share_is_computed_again_after_a_nan(nan_model):
    prompt = "where on the shore does the crab that walks sideways " * 3
    texts = [f"text {i}" for i in range(60)]
    how = {"n_contexts": 1, "n_threads": 1, "pack_tokens": 64, "cpu_backend": "ggml"}
    with Llama(DATA / "tiny-qwen3.gguf", **how) as llama:
        expected = llama.embed_texts(texts, prompt=prompt)
    with Llama(nan_model("tiny-qwen3"), **how) as llama:
        assert llama._scheduler.shares_prefix
        vocab = llama.model.vocab
        assert NAN_TOKEN not in vocab.tokenize(prompt + " ".join(texts))
        bad = vocab.token_to_piece(NAN_TOKEN).decode() * 4
        assert NAN_TOKEN in vocab.tokenize(prompt + bad)
        with pytest.raises(NumericalError) as info:
            llama.embed_texts([*texts[:5], bad, *texts[5:10]], prompt=prompt)
        assert info.value.done.sum() == 10
        assert cosines(llama.embed_texts(texts, prompt=prompt), expected).min() > 0.9999


def test_close_ends_running_calls_at_once():
    llama = Llama(DATA / "tiny-bert.gguf")
    closer = threading.Timer(0.2, llama.close)
    closer.start()
    with pytest.raises(ClosedError):
        llama.embed_texts(TEXTS * 5000, truncate=True, dedup=False)
    closer.join()
    with pytest.raises(ClosedError):
        llama.embed("too late")


def test_close_fails_what_waits_in_futures():
    llama = Llama(DATA / "tiny-bert.gguf", queue_tokens=1 << 24)
    futures = [llama.submit(TEXTS * 20, truncate=True, dedup=False) for _ in range(6)]
    llama.close()
    outcomes = {type(future.exception(timeout=60)) for future in futures}
    assert ClosedError in outcomes
    assert outcomes <= {ClosedError, type(None)}


@pytest.fixture
def bare():
    """Give a scheduler, and a function that makes a job of it: one text added, not sealed."""
    model = Model(DATA / "tiny-bert.gguf")
    how = {"n_contexts": 1, "pack_tokens": 64, "n_ctx": 64, "n_ubatch": 64, "n_threads": 1}
    scheduler, encoder = Scheduler(model, **how), Tokenization(model.vocab, limit=64)

    def make():
        job = scheduler.job(encoder, 1)
        job.add([[2, 7, 3]])
        return job

    yield scheduler, make
    scheduler.close()


@pytest.mark.parametrize("n_before", [0, 1])
@pytest.mark.parametrize("moment", ["start", "started", "sealing", "sealed"])
def test_a_future_resolves_whenever_the_scheduler_closes(monkeypatch, bare, moment, n_before):
    scheduler, make = bare
    job = make()
    for _ in range(n_before):  # the notifier is there already
        scheduler.future(make()).result(timeout=60)

    class Thread(threading.Thread):
        def start(self):
            if moment == "start":
                scheduler.close()
            super().start()
            if moment == "started":
                scheduler.close()

    class Future(_core._JobFuture):
        def __init__(self, *args):
            if moment == "sealing":
                scheduler.close()
            super().__init__(*args)

    monkeypatch.setattr(_core.threading, "Thread", Thread)
    monkeypatch.setattr(_core, "_JobFuture", Future)
    future = scheduler.future(job)
    if moment == "sealed":
        scheduler.close()
    error = future.exception(timeout=60)
    assert error is None or isinstance(error, ClosedError)


def test_a_notifier_that_could_not_start_is_started_for_the_next_future(monkeypatch, bare):
    scheduler, make = bare

    def fail(self):
        raise RuntimeError("can't start new thread")

    job = make()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            scheduler.future(job)
    assert scheduler.future(job).result(timeout=60).shape == (1, 32)


def test_a_finish_and_a_remap_that_raise_end_their_own_future_only(bare):
    scheduler, make = bare

    def finish(rows):
        raise ClosedError("in finish")

    def remap(error):
        raise RuntimeError("in remap")

    with pytest.raises(RuntimeError, match="in remap"):
        scheduler.future(make(), finish, remap).result(timeout=60)
    assert scheduler.future(make()).result(timeout=60).shape == (1, 32)


def test_a_llama_that_is_dropped_stops_its_workers():
    before = threading.active_count()
    for _ in range(5):
        Llama(DATA / "tiny-bert.gguf").submit("a crab").result(timeout=60)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def run_python(code: str, **keywords) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(DATA / "tiny-bert.gguf")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **keywords,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_a_clear_error_and_exits():
    run = run_python(
        """
        import os, sys
        from llamacrab import Llama
        from llamacrab.errors import ForkError
        llama = Llama(sys.argv[1])
        llama.embed("parent")
        if os.fork() == 0:
            try:
                llama.embed("child")
            except ForkError as error:
                print(error, flush=True)
            sys.exit(0)
        _, status = os.wait()
        print(status, llama.embed("parent").shape)
        """
    )
    assert run.returncode == 0, run.stderr
    assert "make a new one after the fork" in run.stdout
    assert "0 (32,)" in run.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_frees_nothing_of_its_parent_and_waits_for_no_thread():
    run = run_python(
        """
        import gc, os, sys
        from llamacrab import Batch, Context, Llama, Model
        from llamacrab.errors import ForkError
        model = Model(sys.argv[1])
        contexts = [Context(model, n_threads=n, n_ctx=64) for n in (1, 4)]
        llama = Llama(sys.argv[1])
        batch = Batch(64)
        batch.add(0, list(range(2, 62)))
        for context in contexts:
            context.decode(batch)
        future = llama.submit("parent")
        future.result()
        if os.fork() == 0:
            for context in contexts:
                for call in (lambda: context.decode(batch), lambda: context.seq_row(0)):
                    try:
                        call()
                    except ForkError as error:
                        print(error, flush=True)
                context.close()
            llama.close()
            del context, contexts, batch, llama, future, model
            gc.collect()
            sys.exit(0)
        _, status = os.wait()
        for context in contexts:
            context.decode(batch)
        print(status, llama.embed("parent").shape)
        """
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("this Context was made in process") == 4
    assert "0 (32,)" in run.stdout


def test_an_interpreter_that_ends_with_work_queued_ends_quietly():
    run = run_python(
        """
        import sys
        from llamacrab import Llama
        llama = Llama(sys.argv[1], queue_tokens=1 << 24)
        future = llama.submit([f"text {i}" for i in range(50_000)])
        """
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_ctrl_c_stops_a_call():
    code = """
        import sys
        from llamacrab import Llama
        computing = []
        def on_pack(pack):
            if not computing:
                computing.append(pack)
                print("computing", flush=True)
        llama = Llama(sys.argv[1], on_pack=on_pack)
        try:
            llama.embed_texts((f"text {i}" for i in range(5_000_000)))
        except KeyboardInterrupt:
            print("interrupted", llama.embed("still there").shape)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(DATA / "tiny-bert.gguf")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "computing\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == "interrupted (32,)\n"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LIMIT), max_size=80),
    pack_tokens=st.integers(1, 300),
    n_seq_max=st.integers(1, 40),
)
def test_packs_keep_their_bounds_and_every_text_is_computed_once(lengths, pack_tokens, n_seq_max):
    with Llama(
        DATA / "tiny-bert.gguf", n_contexts=2, pack_tokens=pack_tokens, n_seq_max=n_seq_max
    ) as llama:
        rows = llama.embed_texts([[7 + n % 50] * n for n in lengths], dedup=False)
        packs = llama.recent_packs()
        budget = llama._scheduler.pack_tokens
    assert np.isfinite(rows).all()
    assert packs["n_texts"].sum() == len(lengths)
    assert packs["n_tokens"].sum() == sum(lengths)
    assert (packs["n_texts"] <= n_seq_max).all()
    assert ((packs["n_tokens"] <= budget) | (packs["n_texts"] == 1)).all()


def test_the_end_of_a_job_is_shared_out_among_workers():
    with Llama(DATA / "tiny-bert.gguf", n_contexts=2, n_threads=1, pack_tokens=192) as llama:
        # 192 tokens are one pack's worth, but each of two workers takes a part: half, if both idle.
        llama.embed_texts([[7 + i] * 16 for i in range(12)], dedup=False)
        packs = llama.recent_packs()
    assert packs["n_tokens"].sum() == 192
    assert 96 <= packs["n_tokens"].max() <= 128


def test_stats_count_what_was_done(tiny):
    stats = tiny.stats()
    assert set(stats) == {"queued_texts", "queued_tokens", "tokenize_seconds", "workers"}
    assert len(stats["workers"]) == 2
    for worker in stats["workers"]:
        assert worker["tokens"] >= worker["texts"] >= worker["packs"] > 0
        assert worker["decode_seconds"] > 0


def test_every_pack_is_told_of_and_a_callback_that_raises_is_only_logged(caplog):
    told = []

    def on_pack(record):
        told.append(record)
        raise RuntimeError("a bug of the caller")

    with Llama(DATA / "tiny-bert.gguf", n_contexts=2, on_pack=on_pack) as llama:
        llama.embed_texts(TEXTS, truncate=True, dedup=False)
        packs = llama.recent_packs()
    assert [tuple(record.values()) for record in told] == packs.tolist()
    assert list(told[0]) == list(packs.dtype.names)
    assert sum(record["n_texts"] for record in told) == len(TEXTS)
    assert set(packs["worker"]) <= {0, 1}
    assert "on_pack raised" in caplog.text


def test_texts_are_encoded_by_several_threads_and_stay_in_order(tiny):
    lengths = [1 + 7 * i % 90 for i in range(3000)]
    ids = [[5 + i % 40] * n for i, n in enumerate(lengths)]
    words = [
        " ".join(tiny.model.vocab.token_to_piece(9).decode() for _ in range(n)) for n in lengths
    ]
    mixed = [words[i] if i % 3 else ids[i] for i in range(len(ids))]
    rows = tiny.embed_texts(mixed, truncate=True)
    picked = range(0, len(mixed), 97)
    alone = np.array([tiny.embed(mixed[i], truncate=True) for i in picked])
    assert cosines(rows[list(picked)], alone).min() > 0.9999


def test_the_first_text_that_cannot_be_encoded_is_named_whichever_thread_met_it(tiny):
    texts = ["short " * 20] * 400
    texts[251] = texts[333] = "long " * 500
    with pytest.raises(TextTooLongError) as info:
        tiny.embed_texts(texts)
    assert info.value.index == 251
