"""llama.cpp's log goes to the logger `llamacrab`, and nowhere by itself."""

from __future__ import annotations

import logging
import threading

import pytest
from helpers import gguf_path, python

from llamacrab import Llama, Model, errors


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


@pytest.mark.parametrize(("level", "expected"), [("INFO", True), ("ERROR", False)])
def test_lines_show_at_the_level_that_is_asked_for(caplog, level, expected):
    with caplog.at_level(level, logger="llamacrab"), Llama(gguf_path("tiny-bert")):
        pass
    lines = [record for record in caplog.records if record.name == "llamacrab"]
    assert bool(lines) == expected
    assert not any(record.getMessage().endswith("\n") for record in lines)


def test_lines_come_from_any_thread(caplog):
    with caplog.at_level(logging.INFO, logger="llamacrab"):
        thread = threading.Thread(target=lambda: Model(gguf_path("tiny-bert")).close())
        thread.start()
        thread.join()
    assert {record.threadName for record in caplog.records} == {thread.name}


def test_a_handler_that_raises_does_no_harm():
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("broken handler")

    logger = logging.getLogger("llamacrab")
    handler = Broken(level=logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with Llama(gguf_path("tiny-bert")) as llama:
            assert llama.embed("a crab").shape == (32,)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_llama_cpp_s_own_words_are_in_the_exception(tmp_path):
    whole = gguf_path("tiny-bert").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-1000])
    with pytest.raises(errors.ModelCorruptError, match="not within the file bounds"):
        Model(path)
