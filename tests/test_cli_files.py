"""The command line and files: what it reads, what it writes, and what it takes back.

Most of it runs in this process, which is faster than one for each command.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import warnings

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import gguf_path, one_cpu, python, rewrite_gguf

from llamacrab import Llama, cli

MODEL = str(gguf_path("tiny-bert"))
RERANKER = str(gguf_path("tiny-bert-rank"))
TEXTS = ["a crab", "a lobster, boiled", "the tide\ncomes in", "sand"]
CSV = 'id,body\n1,a crab\n2,"a lobster, boiled"\n3,"the tide\ncomes in"\n4,sand\n'


@pytest.fixture
def run(capsys, monkeypatch):
    """Return what runs a command line in this process: exit code, output, complaints."""

    def command(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            code = cli.run([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.csv"
    path.write_text(CSV)
    return path


@pytest.fixture(scope="module")
def expected():
    with Llama(MODEL) as llama:
        return llama.embed_texts(TEXTS)


@pytest.fixture
def prompted(tmp_path):
    """Return a model with prompts of its own."""
    string = gguf.GGUFValueType.STRING
    fields = {
        f"llamacrab.prompt.{name}": (f"{name} is: ", string)
        for name in ("query", "document", "clustering")
    }
    return rewrite_gguf(gguf_path("tiny-bert"), tmp_path / "prompted.gguf", fields)


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_every_command_reads_a_field_of_every_kind_of_file(run, tmp_path, expected, name):
    path = tmp_path / name
    if name == "a.parquet":
        pa.parquet.write_table(pa.table({"body": TEXTS}), path)
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    else:
        path.write_bytes(gzip.compress(CSV.encode()) if name.endswith("gz") else CSV.encode())
    code, _, err = run("embed", path, "--field", "body", "-o", tmp_path / "c.npy", "-m", MODEL)
    assert code == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), expected, atol=1e-2)
    code, out, err = run("search", path, "a crab", "--field", "body", "-k", "1", "-m", MODEL)
    assert (code, out.split("\t")[1]) == (0, "a crab\n"), err
    code, out, err = run("rerank", "what?", path, "--field", "body", "-m", RERANKER)
    assert code == 0, err
    shown = sorted(line.split("\t")[1] for line in out.splitlines())
    assert shown == sorted(text.replace("\n", " ") for text in TEXTS)


@pytest.mark.parametrize("command", [("embed", "-o", "c.npy"), ("search",), ("rerank",)])
def test_a_field_that_is_not_there_is_answered_with_those_that_are(
    run, corpus, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    name, *options = command
    places = {"search": (corpus, "q"), "rerank": ("q", corpus)}.get(name, (corpus,))
    code, out, err = run(name, *places, *options, "-m", RERANKER)
    assert (code, out) == (1, "")
    assert err == "llamacrab: corpus.csv has no column text; its columns are id, body\n"
    assert not (tmp_path / "c.npy").exists()


def test_a_row_without_a_text_is_named(run, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\nfine\n\n''\n\"\"\n")
    code, _, err = run("embed", path, "-o", tmp_path / "c.npy", "-m", MODEL)
    assert code == 1
    assert "row 2: a.csv, line 5: there is no text: column 'text' is empty" in err


def test_texts_and_separated_values_need_no_pyarrow(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from llamacrab import cli\n"
        "*paths, model, out = sys.argv[1:]\n"
        "for path in paths:\n"
        "    field = [] if path.endswith('.txt') else ['--field', 'body']\n"
        "    assert cli.run(['embed', path, *field, '-o', out, '-m', model]) == 0\n"
        "    assert cli.run(['search', path, 'q', *field, '--vectors', out, '-m', model]) == 0\n"
        "sys.exit(cli.run(['embed', paths[0], '-o', out[:-4], '-m', model]))"
    )
    paths = [tmp_path / "a.txt", tmp_path / "a.jsonl", corpus]
    done = python(code, *paths, MODEL, tmp_path / "out.npy")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'llamacrab[corpus]'")


def test_a_stream_holds_lines_or_what_is_said(run, tmp_path):
    out = tmp_path / "c.jsonl"
    for kind, stdin in [
        ("lines", "a crab\nsand\n"),
        ("jsonl", '{"body": "a crab"}\n{"body": "sand"}\n'),
        ("csv", CSV.replace('3,"the tide\ncomes in"\n', "").replace('2,"a lobster, boiled"\n', "")),
        ("tsv", "body\tid\na crab\t1\nsand\t2\n"),
    ]:
        field = [] if kind == "lines" else ["--field", "body"]
        code, _, err = run(
            "embed", "-", "--input-format", kind, *field, "-o", out, "-m", MODEL, stdin=stdin
        )
        assert code == 0, err
        texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        assert texts == ["a crab", "sand"], kind


def test_what_a_stream_cannot_be_is_a_usage_error(run, tmp_path):
    common = ("-o", tmp_path / "c.npy", "-m", MODEL)
    code, _, err = run("embed", "-", "--field", "body", *common, stdin="{}")
    assert (code, "lines of plain text have no fields" in err) == (2, True)
    code, _, err = run("embed", "-", "--input-format", "parquet", *common)
    assert (code, "must be files, not a stream" in err) == (2, True)
    (tmp_path / "a.dat").write_text("a\n")
    code, _, err = run("search", tmp_path / "a.dat", "q", "-m", MODEL)
    assert (code, "cannot read this kind of file" in err) == (1, True)
    assert run("search", tmp_path / "a.dat", "q", "-m", MODEL, "--input-format", "lines")[0] == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read_as_a_stream(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", f"printf 'a crab\\nsand\\n' > {pipe}"]):
        code, out, err = run("search", pipe, "sand", "-k", "1", "-m", MODEL)
    assert (code, out.split("\t")[1]) == (0, "sand\n"), err


# ------------------------------------------------------------------------------------- writing


def test_a_dash_as_output_is_standard_output(run, tmp_path, monkeypatch, expected):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("embed", "-", "-o", "-", "-m", MODEL, stdin="a crab\nsand\n")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == ["a crab", "sand"]
    vectors = [row["embedding"] for row in rows]
    np.testing.assert_allclose(vectors, expected[[0, 3]], atol=1e-2)
    assert err == "2 texts -> standard output: float32, (2, 32)\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path):
    (tmp_path / "a.txt").write_text("a crab\n" * 100)
    command = [sys.executable, "-m", "llamacrab", "embed", str(tmp_path / "a.txt"), "-o", "-"]
    with subprocess.Popen(
        [*command, "-m", MODEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize(
    "option",
    [
        ("--keep", "id"),
        ("--keep-text",),
        ("--export", "x.duckdb"),
        ("--on-error", "fail"),
        ("--format", "npy"),
        ("--shard-rows", "5"),
        ("--overwrite",),
        ("--json-progress",),
    ],
)
@pytest.mark.parametrize("output", ["c.npy", "-"])
def test_an_option_for_folders_is_a_usage_error_for_one_file(run, option, output):
    code, out, err = run("embed", "-", "-o", output, "-m", MODEL, *option, stdin="a\n")
    assert (code, out) == (2, "")
    assert err.startswith(f"llamacrab: {option[0]} is for a folder of files")


# ------------------------------------------------------------------- vectors that are taken back

OUTPUTS = ["c.npy", "c.jsonl", "parquet", "arrow", "npy", "jsonl"]


def embed_to(run, corpus, name, *options, model=MODEL):
    """Embed a corpus into a file, or into a folder of files of that format; return where."""
    folder = () if "." in name else ("--format", name, "--shard-rows", "3")
    out = corpus.parent / name
    code, _, err = run(
        "embed", corpus, "--field", "body", "-o", out, "-m", model, *folder, *options
    )
    assert code == 0, err
    return out


def searched(run, corpus, *options, query="a crab", model=MODEL):
    return run("search", corpus, query, "--field", "body", "-m", model, *options)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_search_takes_what_embed_writes(run, corpus, name, dtype):
    _, want, _ = searched(run, corpus)
    out = embed_to(run, corpus, name, "--dtype", dtype)
    code, got, err = searched(run, corpus, "--vectors", out)
    assert (code, err) == (0, "")
    for a, b in zip(got.splitlines(), want.splitlines(), strict=True):
        (score, text), (wanted, of) = a.split("\t"), b.split("\t")
        assert text == of
        assert float(score) == pytest.approx(float(wanted), abs=2e-3)


@pytest.mark.parametrize("name", ["c.npy", "c.jsonl", "parquet", "npy"])
@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
def test_search_takes_bits(run, corpus, name, dtype):
    out = embed_to(run, corpus, name, "--dtype", dtype)
    code, got, err = searched(run, corpus, "--vectors", out, "-k", "1")
    assert (code, got.split("\t")[1:]) == (0, ["a crab\n"]), err


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_query_is_embedded_as_the_corpus_was(run, corpus, name):
    out = embed_to(run, corpus, name, "--pooling", "cls", "--dimensions", "16")
    code, got, err = searched(run, corpus, "--vectors", out, "-k", "1")
    assert (code, got) == (0, "1.0000\ta crab\n"), err


@pytest.mark.parametrize("name", ["parquet", "arrow", "npy", "jsonl"])
def test_rows_that_were_left_out_of_a_folder_shift_nothing(run, corpus, name):
    corpus.write_text('id,body\n1,a crab\n2,\n3,one,too many\n4,sand\n5,"a lobster"\n')
    out = embed_to(run, corpus, name, "--on-error", "skip")
    for text in ("sand", "a lobster"):
        code, got, err = searched(run, corpus, "--vectors", out, "-k", "1", query=text)
        assert (code, got.split("\t")[1]) == (0, f"{text}\n"), err


@pytest.mark.parametrize("name", OUTPUTS)
def test_vectors_of_another_number_of_texts_or_model_are_refused(run, corpus, name):
    out = embed_to(run, corpus, name)
    code, _, err = searched(run, corpus, "--vectors", out, model=gguf_path("tiny-roberta"))
    assert (code, "another model" in err, "tiny-roberta" in err) == (1, True, True), err
    corpus.write_text(CSV + "5,one more\n")
    code, shown, err = searched(run, corpus, "--vectors", out)
    assert (code, shown) == (1, "")
    assert "4" in err
    assert "5 texts" in err


@pytest.mark.parametrize("name", ["c.npy", "c.jsonl", "parquet", "jsonl"])
def test_vectors_of_texts_that_were_edited_are_refused(run, corpus, name):
    out = embed_to(run, corpus, name, *([] if "." in name else ["--keep-text"]))
    corpus.write_text(CSV.replace("boiled", "grilled"))
    code, shown, err = searched(run, corpus, "--vectors", out)
    assert (code, shown) == (1, "")
    assert "embed the corpus again" in err


@pytest.mark.parametrize("name", ["c.npy", "parquet"])
def test_a_row_that_has_no_text_any_more_is_refused(run, corpus, name):
    out = embed_to(run, corpus, name)
    corpus.write_text(CSV.replace("a crab", ""))
    (corpus.parent / "c.npy.json").unlink(missing_ok=True)
    code, shown, err = searched(run, corpus, "--vectors", out)
    assert (code, shown) == (1, "")
    assert f"row 0 of {out} has another text" in err


def test_files_that_do_not_belong_together_are_refused(run, corpus, tmp_path, expected):
    out = embed_to(run, corpus, "c.npy")
    np.save(out, expected[::-1])
    code, _, err = searched(run, corpus, "--vectors", out)
    assert (code, "c.npy.json does not describe c.npy" in err) == (1, True), err
    (tmp_path / "c.npy.json").write_text("{")
    code, _, err = searched(run, corpus, "--vectors", out)
    assert (code, "c.npy.json is damaged" in err) == (1, True), err
    (tmp_path / "c.npy.json").unlink()
    assert searched(run, corpus, "--vectors", out)[0] == 0


def test_a_folder_that_is_not_whole_is_refused(run, corpus, tmp_path):
    code, _, err = searched(run, corpus, "--vectors", tmp_path)
    assert (code, "has no manifest.json" in err) == (1, True), err
    out = embed_to(run, corpus, "parquet")
    manifest = out / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"complete": true', '"complete": false'))
    code, _, err = searched(run, corpus, "--vectors", out)
    assert (code, "is not finished" in err) == (1, True), err
    manifest.write_text(whole)
    (out / "part-000001.parquet").unlink()
    code, _, err = searched(run, corpus, "--vectors", out)
    assert (code, "part-000001.parquet is damaged or missing" in err) == (1, True), err


def test_an_empty_corpus_gives_nothing(run, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    for name in ("e.npy", "e.jsonl", "folder"):
        assert run("embed", path, "-o", tmp_path / name, "-m", MODEL)[0] == 0
        code, out, err = run("search", path, "q", "-m", MODEL, "--vectors", tmp_path / name)
        assert (code, out) == (0, ""), err


# -------------------------------------------------------------------------------------- prompts


def asked_as(prompted, prompt):
    """Return the first line of a search whose query and corpus had prompts."""
    query, document = prompt
    with Llama(prompted) as llama:
        row = llama.embed("a crab", prompt=query)
        rows = llama.embed_texts(TEXTS, prompt=document)
    best = int((rows @ row).argmax())
    return f"{rows[best] @ row:.2f}", TEXTS[best]


@pytest.mark.parametrize("name", ["c.npy", "c.jsonl", "parquet"])
@pytest.mark.parametrize(
    ("embedded", "searching", "prompts"),
    [
        (["--prompt-name", "document"], [], ("query is: ", "document is: ")),
        (["--prompt", "document is: "], [], ("query is: ", "document is: ")),
        (["--prompt", ""], [], ("", "")),
        (["--prompt", ""], ["--prompt-name", "query"], ("query is: ", "")),
        (["--prompt", "x: "], ["--prompt", "y: "], ("y: ", "x: ")),
    ],
)
def test_a_query_gets_what_goes_with_the_prompt_of_the_vectors(
    run, corpus, prompted, name, embedded, searching, prompts
):
    out = embed_to(run, corpus, name, *embedded, model=prompted)
    code, got, err = searched(run, corpus, "--vectors", out, "-k", "1", *searching, model=prompted)
    assert code == 0, err
    assert ("made without the model's prompts" in err) == (prompts == ("", ""))
    score, text = asked_as(prompted, prompts)
    assert got.split("\t")[1] == text.replace("\n", " ") + "\n"
    assert float(got.split("\t")[0]) == pytest.approx(float(score), abs=0.02)


@pytest.mark.parametrize("name", ["c.npy", "c.jsonl", "parquet"])
def test_vectors_with_a_prompt_for_something_else_are_refused(run, corpus, prompted, name):
    out = embed_to(run, corpus, name, "--prompt-name", "clustering", model=prompted)
    code, _, err = searched(run, corpus, "--vectors", out, model=prompted)
    assert code == 1
    assert "was made with 'clustering is: ' before every text" in err
    assert "--prompt-name" in err


def test_embed_says_that_a_model_has_prompts_and_search_that_nothing_is_known(
    run, corpus, prompted, tmp_path
):
    common = ("embed", corpus, "--field", "body", "-o", tmp_path / "c.npy")
    assert "--prompt-name (clustering, document, query)" in run(*common, "-m", prompted)[2]
    assert "note:" not in run(*common, "-m", prompted, "--prompt", "")[2]
    assert "note:" not in run(*common, "-m", MODEL)[2]
    (tmp_path / "c.npy.json").unlink()
    code, _, err = searched(run, corpus, "--vectors", tmp_path / "c.npy", model=prompted)
    assert (code, "as if it had been 'document is: '" in err) == (0, True), err


def test_info_says_where_no_prompts_are_known(run, prompted):
    assert "prompts          none known" in run("info", MODEL)[1]
    out = run("info", prompted)[1]
    assert "prompt query     'query is: '" in out
    assert "none known" not in out


# ------------------------------------------------------------------------------ clear messages


def test_a_pooling_that_contradicts_the_gguf_is_warned_of(run, tmp_path):
    common = ("embed", "-", "-o", tmp_path / "c.npy", "-m", MODEL, "--pooling")
    lines = run(*common, "cls", stdin="a\n")[2].splitlines()
    assert lines[0].startswith("llamacrab: warning: ")
    assert "pooling CLS contradicts the GGUF, which says MEAN" in lines[0]
    assert "warning" not in run(*common, "mean", stdin="a\n")[2]


def test_a_text_too_long_names_the_flags_that_help(run, tmp_path):
    long = "a " * 500
    (tmp_path / "a.txt").write_text(f"short\n{long}\n")
    given = (tmp_path / "a.txt", "-m", MODEL, "--n-ctx", "64")
    advice = "64 fit: --truncate cuts it, or --chunk averages over windows of it, or --n-ctx N"
    for out, start in (("c.npy", "text 1 has 502 tokens"), ("c", "row 1: the text has 502")):
        code, _, err = run("embed", *given, "-o", tmp_path / out)
        assert (code, start in err, advice in err) == (1, True, True), err
    code, _, err = run("search", given[0], long, *given[1:])
    assert (code, "the query has 502 tokens" in err, "--chunk" in err) == (1, True, False), err
    assert "text 1 has 502 tokens" in run("search", given[0], "q", *given[1:])[2]
    _, _, err = run("rerank", "q", given[0], "-m", RERANKER)
    assert "document 1 has" in err
    assert "--truncate cuts it" in err
    assert "--n-ctx" not in err  # it takes no longer ones


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_tune_shows_how_far_it_is_and_the_time_left(tmp_path):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "llamacrab", "tune", MODEL, "--seconds", "0.05"]
    with (
        one_cpu(),
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "LLAMACRAB_CACHE": str(tmp_path)},
        ) as process,
    ):
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0
    assert "best, and saved" in out
    n = int(said.split(b" measurements", 1)[0])
    assert re.search(rb"[1-9]\d*/%d \[\d\d:\d\d<\d\d:\d\d" % n, said)  # [elapsed<left
