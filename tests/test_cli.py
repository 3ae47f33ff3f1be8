"""The command line: results on standard output, errors in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from helpers import DATA, gguf_path, python, rewrite_gguf

from llamacrab import Llama, Model, PoolingType
from llamacrab.cli.options import open_llama
from llamacrab.models.default import default_model_path

MODEL = str(gguf_path("tiny-bert"))
RERANKER = str(gguf_path("tiny-bert-rank"))
LINES = ["a crab", "a lobster", "", "the tide comes in"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def run(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "llamacrab", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def expected():
    with Llama(MODEL) as llama:
        return llama.embed_texts(LINES)


def test_embed_writes_a_matrix_with_a_row_a_line(source, tmp_path):
    done = run("embed", source, "-o", tmp_path / "rows.npy", "-m", MODEL)
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "rows.npy")
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected(), atol=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lines.txt",
        "rows.npy",
        "rows.npy.json",
    ]


def test_embed_reads_standard_input_and_json_lines(tmp_path):
    run("embed", "-", "-o", tmp_path / "a.jsonl", "-m", MODEL, stdin="\n".join(LINES))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == LINES
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in LINES))
    done = run(
        "embed", tmp_path / "in.jsonl", "--field", "body", "-o", tmp_path / "b.npy", "-m", MODEL
    )
    assert done.returncode == 0, done.stderr
    vectors = [row["embedding"] for row in rows]
    np.testing.assert_allclose(np.load(tmp_path / "b.npy"), vectors, atol=1e-2)


def test_pooling_and_length_are_options(source, tmp_path):
    run(
        "embed", source, "-o", tmp_path / "a.npy", "-m", MODEL, "--pooling", "cls", "--no-normalize"
    )
    norms = np.linalg.norm(np.load(tmp_path / "a.npy"), axis=1)
    assert abs(norms - 1).max() > 0.01


def test_search_shows_the_nearest_lines_best_first(source, tmp_path):
    done = run("search", source, "a crab", "-k", "2", "-m", MODEL)
    scores, texts = zip(*(line.split("\t") for line in done.stdout.splitlines()), strict=True)
    assert texts[0] == "a crab"
    assert len(texts) == 2
    assert float(scores[0]) >= float(scores[1])
    run("embed", source, "-o", tmp_path / "rows.npy", "-m", MODEL)
    again = run(
        "search", source, "a crab", "-k", "2", "-m", MODEL, "--vectors", tmp_path / "rows.npy"
    )
    assert [line.split("\t")[1] for line in again.stdout.splitlines()] == list(texts)


def test_rerank_sorts_the_documents(source):
    done = run("rerank", "who lives in the sea?", source, "-m", RERANKER)
    scores = [float(line.split("\t")[0]) for line in done.stdout.splitlines()]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)


def test_rerank_takes_an_activation_and_a_number(source):
    done = run("rerank", "who?", source, "-m", RERANKER, "-k", "2", "--activation", "sigmoid")
    scores = [float(line.split("\t")[0]) for line in done.stdout.splitlines()]
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)


def test_a_model_with_classes_shows_each_in_the_order_of_the_file(source, three_classes):
    done = run("rerank", "who?", source, "-m", three_classes, "--activation", "softmax")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[3] for row in rows] == LINES
    for row in rows:
        values = dict(shown.split("=") for shown in row[:3])
        assert list(values) == ["no", "maybe", "yes"]
        assert sum(map(float, values.values())) == pytest.approx(1, abs=1e-3)
    done = run("rerank", "who?", source, "-m", three_classes, "-k", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "leave out --top-k" in done.stderr


@pytest.fixture
def three_classes(tmp_path):
    return rewrite_gguf(
        gguf_path("tiny-bert-rank"),
        tmp_path / "classes.gguf",
        {"bert.classifier.output_labels": (["no", "maybe", "yes"], gguf.GGUFValueType.ARRAY)},
        tensors={
            "cls.output.weight": np.eye(3, 32, dtype=np.float32),
            "cls.output.bias": np.zeros(3, np.float32),
        },
    )


def test_a_warning_is_one_line_on_standard_error(source, tmp_path):
    path = rewrite_gguf(
        gguf_path("tiny-bert-rank"), tmp_path / "m.gguf", drop=("cls.weight", "cls.bias")
    )
    done = run("rerank", "who?", source, "-m", path)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 4
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("llamacrab: warning: the scores of")


@pytest.mark.parametrize("side", ["end", "start", "middle"])
def test_a_long_text_is_cut_where_asked(tmp_path, side):
    text = " ".join(f"w{i}" for i in range(300))
    done = run(
        "embed", "-", "-o", tmp_path / "x.npy", "-m", MODEL, "--truncate-side", side, stdin=text
    )
    assert done.returncode == 0, done.stderr
    with Llama(MODEL) as llama:
        want = llama.embed(text, truncate=side)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy")[0], want, atol=1e-2)


def test_info_and_versions_say_what_is_there():
    done = run("info", MODEL)
    assert "bert" in done.stdout
    assert "[CLS] text [SEP]" in done.stdout
    for label in ("contexts", "threads each", "tokens per pack", "flash attention"):
        assert re.search(rf"^{label} .*\((guess|measured on .*)\)$", done.stdout, re.MULTILINE)
    done = run("versions")
    for word in ("llama.cpp", "GGML_NATIVE", "CPU compiled", "CPU present", "device 0"):
        assert word in done.stdout


def test_threads_are_the_cpus_of_all_contexts():
    # In this process, where the Llama that the command makes can be looked at.
    with open_llama(
        MODEL, PoolingType.UNSPECIFIED, n_ctx=0, threads=1, n_gpu_layers=0, cpu_backend="auto",
        devices=(),
    ) as llama:  # fmt: skip
        assert (llama.layout.n_contexts, llama.layout.n_threads) == (1, 1)


def test_the_devices_that_are_listed_can_all_be_named():
    names = [line.split()[0] for line in run("info", "--devices").stdout.splitlines()]
    assert "CPU" in names
    for name in names:
        Model(MODEL, device=name).close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["embed", "none.txt", "-o", "x.npy"], 1, "none.txt"),
        (["embed", "-", "-o", "x.txt"], 2, "must end in .npy or .jsonl"),
        (["embed", "-"], 2, "Missing option"),
        (["info", "none.gguf"], 1, "no model file"),
        (["info", __file__], 1, "is not a GGUF"),
        (["info", str(gguf_path("tiny-t5"))], 1, "encoder-decoder"),
        (["rerank", "q", "-"], 2, "needs --model"),
        (["rerank", "q", "-", "-m", MODEL], 1, "classification head"),
        (["search", "-", "q", "-m", RERANKER], 1, "use rerank()"),
        (["nonsense"], 2, "No such command"),
        (["embed", "-", "-o", "x.npy", "-m", MODEL, "--pooling", "magic"], 2, "magic"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, stdin="text\n")
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("llamacrab: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_long_is_one_line_unless_truncated(tmp_path):
    arguments = ["embed", "-", "-o", tmp_path / "x.npy", "-m", MODEL]
    done = run(*arguments, stdin="short\n" + "crab " * 500)
    assert done.returncode == 1
    assert "text 1 has" in done.stderr
    assert run(*arguments, "--truncate", stdin="short\n" + "crab " * 500).returncode == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"fine\n\xff\xfe\n"),
        ("a.jsonl", b'{"text": "fine"}\n{"other": 1}\n'),
        ("a.jsonl", b'{"text": "fine"}\n\n'),
        ("a.jsonl", b'{"text": "fine"}\n["text"]\n'),
        ("a.jsonl", b'{"text": "fine"}\n{"text": [7, 8]}\n'),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    done = run("embed", tmp_path / name, "-o", tmp_path / "x.npy", "-m", MODEL)
    assert done.returncode == 1
    assert "line 2" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_half_of_a_surrogate_pair_in_json_is_written_as_the_replacement_character(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800b"}\n')
    done = run("embed", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-m", MODEL)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert row["text"] == "a\ufffdb"
    assert "a\ufffdb" in run("search", tmp_path / "in.jsonl", "a", "-m", MODEL).stdout


def test_a_folder_that_is_not_there_is_noticed_before_anything_is_computed(tmp_path):
    done = run("embed", "-", "-o", tmp_path / "none" / "x.npy", "-m", "none.gguf", stdin="a\n")
    assert done.returncode == 2
    assert "there is no folder" in done.stderr


def test_vectors_of_another_corpus_or_model_are_refused(source, tmp_path):
    path = tmp_path / "rows.npy"
    arguments = ("search", source, "a", "-m", MODEL, "--vectors", path)
    for shape in ((3, 32), (4, 31), (32,)):
        np.save(path, np.ones(shape, np.float32))
        done = run(*arguments)
        assert done.returncode == 1
        assert str(shape) in done.stderr
    path.write_text("no array")
    assert run(*arguments).returncode == 1
    np.save(path, np.eye(4, 32, dtype=np.int8))
    assert len(run(*arguments).stdout.splitlines()) == 4


def test_an_empty_file_gives_no_rows(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert run("embed", tmp_path / "empty.txt", "-o", tmp_path / "x.npy", "-m", MODEL).stdout == ""
    assert np.load(tmp_path / "x.npy").shape == (0, 32)


def test_convert_and_fetch_say_where_the_model_is(tmp_path):
    path = tmp_path / "model.gguf"
    done = run("convert", DATA / "tiny-bert-hf", "-o", path, "--outtype", "f32")
    assert done.stdout.strip() == str(path)
    assert "bert" in run("info", path).stdout
    done = run("convert", tmp_path, "-o", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "lacks config.json" in done.stderr
    done = run("fetch")
    assert default_model_path().name in done.stdout


def test_convert_takes_a_pooling_or_warns_in_one_line(tmp_path):
    folder = shutil.copytree(DATA / "tiny-bert-hf", tmp_path / "some-bert")
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()
    done = run("convert", folder, "-o", tmp_path / "open.gguf")
    assert done.stderr.startswith("llamacrab: warning: ")
    assert done.stderr.count("\n") == 1
    done = run("convert", folder, "-o", tmp_path / "cls.gguf", "--pooling", "cls")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cls" in run("info", tmp_path / "cls.gguf").stdout


def test_without_click_one_line_names_the_extra():
    done = python(
        "import sys; sys.modules['click'] = None\n"
        "sys.argv = ['llamacrab', 'versions']\n"
        "from llamacrab.__main__ import main; main()"
    )
    assert done.returncode == 1
    assert (
        done.stderr == "llamacrab: this needs the package 'click': pip install 'llamacrab[cli]'\n"
    )
