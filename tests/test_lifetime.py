"""Objects close in any order, and leave nothing behind."""

from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest
from helpers import TEXTS, check_python, gguf_path, python

from llamacrab import Batch, Context, Llama, Model, errors


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "a", "b"])))
def test_a_model_and_its_contexts_close_in_any_order(order):
    model = Model(gguf_path("tiny-bert"))
    things = {"model": model, "a": Context(model, n_threads=1), "b": Context(model, n_threads=1)}
    batch = Batch(8)
    batch.add(0, [2, 7, 3])
    for name in order:
        for context in (things[key] for key in ("a", "b") if key in things):
            context.decode(batch)
            assert np.isfinite(context.seq_row(0)).all()
        things.pop(name).close()
    assert model.closed


def test_what_is_closed_says_so_and_closes_again():
    with Model(gguf_path("tiny-bert")) as model, Context(model) as context:
        vocab = model.vocab
    model.close()
    context.close()
    for use in (lambda: model.n_embd, lambda: model.vocab, lambda: Context(model)):
        with pytest.raises(errors.ClosedError, match="the model is closed"):
            use()
    with pytest.raises(errors.ClosedError, match="the context is closed"):
        context.decode(Batch(4))
    assert vocab.tokenize("a crab").size  # a vocabulary holds what it needs


def test_a_context_outlives_the_names_of_its_model():
    context = Context(Model(gguf_path("tiny-bert")), n_threads=1)
    gc.collect()
    batch = Batch(8)
    batch.add(0, [2, 7, 3])
    context.decode(batch)
    assert np.isfinite(context.seq_row(0)).all()


def test_an_interpreter_that_ends_with_everything_open_prints_nothing():
    done = python(
        """
import contextlib, sys, threading
from llamacrab import Context, Llama, Model
from llamacrab.errors import ClosedError

def work():
    # What the exit cuts short is told so, as by close().
    with contextlib.suppress(ClosedError):
        llama.embed_texts([f"text {i}" for i in range(50_000)])

llama = Llama(sys.argv[1])
llama.embed("a crab")
model = Model(sys.argv[1])
context = Context(model)
threading.Thread(target=work, daemon=True).start()
""",
        gguf_path("tiny-bert"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_opening_and_closing_does_not_grow():
    grown = check_python(
        """
import gc, sys
from llamacrab import Llama

def cycle(n):
    for _ in range(n):
        with Llama(sys.argv[1], n_contexts=2) as llama:
            llama.embed("a crab")
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

before = cycle(50)
print((cycle(200) - before) / 200)
""",
        gguf_path("tiny-bert"),
    )
    assert float(grown) < 64  # KiB a cycle; a context alone is megabytes


def test_a_raising_call_leaves_the_llama_usable(load):
    llama = load("tiny-bert")
    with pytest.raises(errors.TextTooLongError):
        llama.embed_texts([*TEXTS[:20], [7] * 1000])
    assert llama.embed("a crab").shape == (32,)
    assert llama.stats()["queued_texts"] == 0


def test_models_load_in_threads_at_once():
    failures = []

    def load_one():
        try:
            with Llama(gguf_path("tiny-xlmr")) as llama:
                llama.embed("a crab")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_spawned_process_makes_its_own():
    check_python(
        """
import multiprocessing, sys
from llamacrab import Llama

def shape(path):
    with Llama(path) as llama:
        return llama.embed("a crab").shape

if __name__ == "__main__":
    print(shape(sys.argv[1]))
""",
        gguf_path("tiny-bert"),
    )
