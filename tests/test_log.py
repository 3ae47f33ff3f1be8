"""llama.cpp's log goes to the logger `llamacrab`, and nowhere by itself."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import pytest
from helpers import gguf_path, python

from llamacrab import Llama, Model, _core, _diagnostics, errors


@contextlib.contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    """Hand the lines of our logger to a handler, down to the handler's own level."""
    logger = logging.getLogger("llamacrab")
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_nothing_is_printed_by_default():
    done = python(
        """
import sys
from llamacrab import Llama, LlamaError
with Llama(sys.argv[1]) as llama:
    llama.embed("a crab")
try:
    Llama(sys.argv[2])
except LlamaError:
    pass
""",
        gguf_path("tiny-bert"),
        gguf_path("tiny-t5"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("level", "expected"), [("DEBUG", True), ("INFO", False)])
def test_lines_show_at_the_level_that_is_asked_for(caplog, level, expected):
    with caplog.at_level(level, logger="llamacrab"), Model(gguf_path("tiny-bert")):
        pass
    lines = [record for record in caplog.records if record.name == "llamacrab"]
    assert bool(lines) == expected
    assert not any(record.getMessage().endswith("\n") for record in lines)


def test_info_is_one_line_for_a_model(caplog):
    with caplog.at_level("INFO", logger="llamacrab"), Llama(gguf_path("tiny-bert")) as llama:
        llama.embed("a crab")
    (line,) = [record.getMessage() for record in caplog.records]
    assert repr(llama.layout) in line
    assert "pooling_type=MEAN n_embd=32 n_ctx=128" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny-bert", "special_eos_id is not in special_eog_ids"),
        ("tiny-xlmr", "model vocab missing newline token"),
        ("tiny-gemma2", "using full-size SWA cache"),
    ],
)
def test_what_llama_cpp_doubts_about_generating_is_no_warning(caplog, name, said):
    with caplog.at_level("DEBUG", logger="llamacrab"), Llama(gguf_path(name)):
        pass
    (level,) = {record.levelname for record in caplog.records if said in record.getMessage()}
    assert level == "DEBUG"
    caplog.clear()
    with caplog.at_level("WARNING", logger="llamacrab"), Llama(gguf_path(name)):
        pass
    assert not caplog.records


def test_a_warning_about_the_vocabulary_stays_one(caplog):
    with caplog.at_level("WARNING", logger="llamacrab"), Model(gguf_path("tiny-jina-v3")):
        pass
    (record,) = caplog.records
    assert (record.levelname, "Mask token is missing" in record.getMessage()) == ("WARNING", True)


def test_lines_come_from_any_thread(caplog):
    with caplog.at_level(logging.DEBUG, logger="llamacrab"):
        thread = threading.Thread(target=lambda: Model(gguf_path("tiny-bert")).close())
        thread.start()
        thread.join()
    assert {record.threadName for record in caplog.records} == {thread.name}


def test_lines_come_from_the_threads_of_the_scheduler(caplog):
    with caplog.at_level(logging.DEBUG, logger="llamacrab"), Llama(gguf_path("tiny-bert")) as llama:
        caplog.clear()
        llama.embed("a crab")
        lines = list(caplog.records)
    assert lines
    assert threading.current_thread().name not in {record.threadName for record in lines}


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_handler_that_raises_does_no_harm(kind):
    class Broken(logging.Handler):
        def emit(self, record):
            raise kind("broken handler")

    with Llama(gguf_path("tiny-bert")) as llama, handled_by(Broken(level=logging.DEBUG)):
        Model(gguf_path("tiny-bert")).close()  # from now on lines of the workers come too
        assert llama.embed("a crab").shape == (32,)


def test_llama_cpp_s_own_words_are_in_the_exception(tmp_path):
    whole = gguf_path("tiny-bert").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-1000])
    with pytest.raises(errors.ModelCorruptError, match="not within the file bounds"):
        Model(path)


def test_ctrl_c_while_a_line_is_handled_is_raised_afterwards():
    done = python(
        """
import logging, signal, sys
from llamacrab import Model

class Pressed(logging.Handler):
    once = False
    def emit(self, record):
        if not self.once:
            self.once = True
            signal.raise_signal(signal.SIGINT)

pressed = Pressed()
logger = logging.getLogger("llamacrab")
logger.addHandler(pressed)
logger.setLevel(logging.DEBUG)
try:
    Model(sys.argv[1])
except KeyboardInterrupt:
    print("interrupted")
""",
        gguf_path("tiny-bert"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_handler_may_use_llamacrab_itself():
    depth = []

    class Nested(logging.Handler):
        def emit(self, record):
            if len(depth) < 3:
                depth.append(record)
                with Model(gguf_path("tiny-bert")) as model:
                    model.vocab.tokenize("a crab")

    with handled_by(Nested(level=logging.DEBUG)), Llama(gguf_path("tiny-bert")) as llama:
        assert llama.embed("a crab").shape == (32,)
    assert len(depth) == 3


def test_one_thread_s_errors_are_not_in_another_s_exception(tmp_path):
    # llama.cpp has one log for the process; what a thread said stays with it.
    paths = [tmp_path / f"{i}.gguf" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(gguf_path("tiny-bert").read_bytes()[: -1000 * (i + 1)])
    messages = [set() for _ in paths]

    def work(i):
        for _ in range(50):
            with pytest.raises(errors.ModelCorruptError) as info:
                Model(paths[i])
            messages[i].add(str(info.value))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(said) for said in messages] == [1] * 4
    assert len(set.union(*messages)) == 4


def test_kernels_that_cannot_be_had_are_told_once(caplog, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_KERNELS", "avx3")
    _diagnostics.log_other_kernels.cache_clear()
    for _ in range(2):
        Llama(gguf_path("tiny-bert")).close()
    _diagnostics.log_other_kernels.cache_clear()
    told = [one.getMessage() for one in caplog.records if "LLAMACRAB_KERNELS" in one.getMessage()]
    used = _core.kernels()
    assert told == (
        [f"LLAMACRAB_KERNELS=avx3 names no kernels that this CPU runs: {used} is in use"]
        if used
        else []
    )


def test_a_build_for_gpus_says_once_that_there_is_none(caplog, monkeypatch):
    monkeypatch.setattr(_diagnostics, "has_gpu", lambda: False)
    monkeypatch.setattr(_diagnostics, "compiled_in", lambda *backends: [*backends][:1])
    _diagnostics.log_missing_gpu.cache_clear()
    with (
        Llama(gguf_path("tiny-bert"), n_gpu_layers=0),
        Llama(gguf_path("tiny-bert"), devices=["CPU"]),
    ):
        assert not caplog.records or "GPU" not in caplog.text
    for _ in range(2):
        Llama(gguf_path("tiny-bert")).close()
    said = [one.getMessage() for one in caplog.records if "GPU" in one.getMessage()]
    assert said == [
        "this build is for CUDA, but llama.cpp finds no such GPU here: the model runs on the CPU"
    ]
    _diagnostics.log_missing_gpu.cache_clear()
