"""Another llama.cpp in the same process is never mistaken for ours."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import pytest
from helpers import check_python, gguf_path

# Functions that every llama.cpp exports, each of which ends the process if we call it.
FOREIGN = (
    *("llama_backend_init", "llama_decode", "llama_tokenize", "llama_model_load_from_file"),
    *("llama_log_set", "llama_init_from_model", "llama_get_embeddings_seq", "llama_free"),
    *("llama_model_default_params", "ggml_init", "ggml_mul_mat", "ggml_backend_dev_count"),
    *("ggml_backend_reg_count", "gguf_init_from_file", "ggml_time_init"),
)


EMBED = """
from llamacrab import Llama
with Llama(sys.argv[1]) as llama:
    assert llama.embed("a crab").shape == (32,)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make the other library")
@pytest.mark.parametrize("first", [True, False])
def test_symbols_of_another_llama_cpp_are_not_taken(tmp_path, first):
    source, library = tmp_path / "other.c", tmp_path / "libllama.so.0"
    source.write_text(
        "#include <stdlib.h>\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in FOREIGN)
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    load = "import ctypes, sys\nctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)\n"
    code = load + EMBED if first else "import sys\nimport llamacrab\n" + load + EMBED
    check_python(code, gguf_path("tiny-bert"), library)


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
@pytest.mark.parametrize("first", ["llama_cpp", "llamacrab"])
def test_llama_cpp_python_works_beside_us(first):
    theirs = """
import llama_cpp
other = llama_cpp.Llama(sys.argv[1], embedding=True, verbose=False)
assert len(other.embed("a crab")) == 32
"""
    parts = [theirs, EMBED] if first == "llama_cpp" else [EMBED, theirs]
    check_python("import sys\n" + "".join(parts + parts), gguf_path("tiny-bert"))
