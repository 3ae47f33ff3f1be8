"""Bulk jobs: what goes in comes out once, whatever happens on the way."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from helpers import TEXTS, cosines, gguf_path

from llamacrab import EmbedOptions, Llama
from llamacrab.corpus import embed_corpus
from llamacrab.corpus.interrupt import Interrupt
from llamacrab.errors import CorpusError, InputError

OPTIONS = EmbedOptions(truncate=True)
ROWS = [{"id": f"t{i}", "text": f"{i} {TEXTS[i % 200][:60]}"} for i in range(700)]


@pytest.fixture(scope="module")
def tiny():
    with Llama(gguf_path("tiny-bert"), n_contexts=2) as llama:
        yield llama


@pytest.fixture(scope="module")
def expected(tiny):
    return tiny.embed_texts([row["text"] for row in ROWS], options=OPTIONS)


def table_of(folder):
    files = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pa.parquet.read_table(file) for file in files])


def check(folder, expected, rows=ROWS, *, killed=False):
    table = table_of(folder)
    assert table.column("row").to_pylist() == list(range(len(rows)))
    assert table.column("id").to_pylist() == [row["id"] for row in rows]
    vectors = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
    assert cosines(vectors, expected).min() > 0.9999
    if not killed:
        assert [path.name for path in folder.glob(".*")] == [".lock"]


def write_jsonl(path, rows=ROWS, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


def sources(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pa.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    pa.csv.write_csv(table, tmp_path / "rows.csv")
    with pa.ipc.new_file(tmp_path / "rows.arrow", table.schema) as out:
        out.write_table(table)
    for k in range(2):
        pa.parquet.write_table(table.slice(350 * k, 350), tmp_path / f"half-{k}.parquet")
    yield write_jsonl(tmp_path / "rows.jsonl")
    yield write_jsonl(tmp_path / "rows.jsonl.gz", opener=gzip.open)
    yield tmp_path / "rows.parquet"
    yield tmp_path / "rows.csv"
    with gzip.open(tmp_path / "rows.tsv.gz", "wt", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter="\t")
        out.writerow(["text", "id"])
        out.writerows([row["text"], row["id"]] for row in ROWS)
    yield tmp_path / "rows.tsv.gz"
    yield tmp_path / "rows.arrow"
    yield str(tmp_path / "half-*.parquet")
    yield [tmp_path / "half-0.parquet", tmp_path / "half-1.parquet"]
    yield table
    yield (row for row in ROWS)


def test_every_kind_of_source_gives_the_same_rows_in_order(tiny, expected, tmp_path):
    for k, source in enumerate(sources(tmp_path)):
        folder = tmp_path / f"out-{k}"
        done = embed_corpus(
            source, folder, tiny, keep=["id"], shard_rows=150 + 100 * k, options=OPTIONS
        )
        check(folder, expected)
        assert (done.n_rows, done.n_rejected, done.complete) == (700, 0, True)


def test_the_kind_of_a_file_can_be_given(tiny, tmp_path):
    path = tmp_path / "rows.export"
    path.write_text("id,text\n1,a crab\n2,sand\n")
    embed_corpus(path, tmp_path / "out", tiny, input_format="csv", keep=["id"], keep_text=True)
    assert table_of(tmp_path / "out").column("text").to_pylist() == ["a crab", "sand"]
    with pytest.raises(InputError, match="input_format must be one of lines, jsonl, csv"):
        embed_corpus(path, tmp_path / "out", tiny, input_format="pdf")


def test_plain_lines_are_texts(tiny, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{row['text']}\n" for row in ROWS[:50]), encoding="utf-8")
    embed_corpus(path, tmp_path / "out", tiny, keep_text=True, options=OPTIONS)
    assert table_of(tmp_path / "out").column("text").to_pylist() == [
        row["text"] for row in ROWS[:50]
    ]


@pytest.mark.parametrize("kind", ["npy", "arrow", "jsonl"])
def test_other_formats_hold_the_same_vectors(tiny, expected, tmp_path, kind):
    folder = tmp_path / "out"
    embed_corpus(ROWS, folder, tiny, format=kind, shard_rows=300, options=OPTIONS)
    files = sorted(folder.glob("part-*"))
    assert len(files) == 3
    if kind == "npy":
        parts = [np.load(file, mmap_mode="r") for file in files]
    elif kind == "arrow":
        tables = [pa.ipc.open_file(file).read_all() for file in files]
        parts = [np.array(table.column("embedding").to_pylist()) for table in tables]
    else:
        parts = [
            np.array([json.loads(line)["embedding"] for line in file.read_text().splitlines()])
            for file in files
        ]
    assert cosines(np.concatenate(parts), expected).min() > 0.9999


def test_a_dtype_goes_through_to_the_files(tiny, tmp_path):
    options = EmbedOptions(truncate=True, dtype="float16", dimensions=16)
    embed_corpus(ROWS, tmp_path / "out", tiny, options=options)
    kind = table_of(tmp_path / "out").schema.field("embedding").type
    assert (kind.list_size, kind.value_type) == (16, pa.float16())


def test_a_finished_job_is_not_done_again_and_another_one_is_refused(tiny, tmp_path):
    source, folder = write_jsonl(tmp_path / "rows.jsonl"), tmp_path / "out"
    embed_corpus(source, folder, tiny, shard_rows=200, options=OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    again = embed_corpus(source, folder, tiny, shard_rows=200, options=OPTIONS)
    assert (again.n_resumed, again.n_rows) == (700, 700)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    with pytest.raises(CorpusError, match=r"options: .*'normalize': True"):
        embed_corpus(source, folder, tiny, options=EmbedOptions(normalize=False, truncate=True))
    write_jsonl(source, ROWS[:300])
    with pytest.raises(CorpusError, match="source: "):
        embed_corpus(source, folder, tiny, options=OPTIONS)
    with Llama(gguf_path("tiny-xlmr")) as other, pytest.raises(CorpusError, match="model: "):
        embed_corpus(source, folder, other, options=OPTIONS)
    assert embed_corpus(source, folder, tiny, overwrite=True, options=OPTIONS).n_rows == 300


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_shard_is_noticed_and_made_again(tiny, expected, tmp_path, how):
    source, folder = write_jsonl(tmp_path / "rows.jsonl"), tmp_path / "out"
    keywords = {"keep": ["id"], "shard_rows": 100, "options": OPTIONS}
    embed_corpus(source, folder, tiny, **keywords)
    shard = folder / "part-000003.parquet"
    if how == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    assert embed_corpus(source, folder, tiny, **keywords).n_resumed == 300
    check(folder, expected)


def test_rows_that_are_wrong_fail_or_are_listed_with_the_reason(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = [b'{"text": "good one"}', b"no json", b'{"text": "\xff"}', b'{"other": 1}', b"[1]"]
    bad += [b'{"text": null}', json.dumps({"text": "long " * 500}).encode(), b'{"text": "last"}']
    path.write_bytes(b"\n".join(bad) + b"\n")
    with pytest.raises(CorpusError, match=r"row 1: rows\.jsonl, line 2: no JSON: "):
        embed_corpus(path, tmp_path / "fail", tiny)
    done = embed_corpus(path, tmp_path / "skip", tiny, on_error="skip")
    assert (done.n_rows, done.n_rejected) == (2, 6)
    assert table_of(tmp_path / "skip").column("row").to_pylist() == [0, 7]
    rejects = rejects_of(tmp_path / "skip")
    assert list(rejects) == [1, 2, 3, 4, 5, 6]
    assert "500" in rejects[6] or "502" in rejects[6]
    assert "no field 'text'" in rejects[3]


def rejects_of(folder):
    lines = (folder / "part-000000.rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["row"]: row["reason"] for row in map(json.loads, lines)}


def test_broken_lines_of_a_csv_are_rejected_by_their_line(tiny, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        codecs.BOM_UTF8
        + b'id,text\n1,"two\nlines, one text"\n2,one,too many\n3\n4,\xff\n\n5,last\n'
        b'6,"' + b"long " * 40_000 + b'"\n'
    )
    with pytest.raises(CorpusError, match=r"row 1: rows\.csv, line 4: 3 values, but 2 columns"):
        embed_corpus(path, tmp_path / "fail", tiny, options=OPTIONS)
    keywords = {"keep": ["id"], "keep_text": True, "options": OPTIONS}
    embed_corpus(path, tmp_path / "skip", tiny, on_error="skip", **keywords)
    table = table_of(tmp_path / "skip")
    assert table.column("id").to_pylist() == ["1", "5", "6"]
    assert table.column("text").to_pylist()[:2] == ["two\nlines, one text", "last"]
    assert rejects_of(tmp_path / "skip") == {
        1: "rows.csv, line 4: 3 values, but 2 columns",
        2: "rows.csv, line 5: 1 values, but 2 columns",
        3: "rows.csv, line 6: not UTF-8",
    }


def test_a_byte_order_mark_is_no_part_of_the_first_text(tiny, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"a crab\nanother\n")
    embed_corpus(path, tmp_path / "out", tiny, keep_text=True)
    assert table_of(tmp_path / "out").column("text").to_pylist() == ["a crab", "another"]


def test_a_table_that_is_no_utf8_is_rejected_row_by_row(tiny, tmp_path):
    raw = pa.array([b"good", b"\xff", None, b"last"], type=pa.binary())
    table = pa.table({"text": raw.view(pa.string())})
    with pytest.raises(CorpusError, match=r"row 1: .*codec can't decode"):
        embed_corpus(table, tmp_path / "fail", tiny)
    embed_corpus(table, tmp_path / "skip", tiny, on_error="skip")
    assert table_of(tmp_path / "skip").column("row").to_pylist() == [0, 3]
    assert sorted(rejects_of(tmp_path / "skip")) == [1, 2]


def test_a_file_that_ends_in_the_middle_stops_the_job_with_the_row(tiny, tmp_path):
    whole = write_jsonl(tmp_path / "rows.jsonl.gz", ROWS * 3, opener=gzip.open)
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    with pytest.raises(CorpusError, match="cannot read beyond row 1024"):
        embed_corpus(path, tmp_path / "out", tiny, options=OPTIONS)
    assert len(table_of(tmp_path / "out")) == 1024


def test_what_was_computed_before_a_wrong_row_is_kept(tiny, tmp_path):
    rows = [*ROWS, *ROWS, *ROWS, {"id": "x", "text": "long " * 500}]
    keywords = {"keep": ["id"], "shard_rows": 5000, "options": EmbedOptions()}
    with pytest.raises(CorpusError, match="row 2100: the text has 502 tokens"):
        embed_corpus(rows, tmp_path / "out", tiny, **keywords)
    assert len(table_of(tmp_path / "out")) == 2048
    rows[-1]["text"] = "short"
    assert embed_corpus(rows, tmp_path / "out", tiny, **keywords).n_resumed == 2048
    assert table_of(tmp_path / "out").column("row").to_pylist() == list(range(2101))


def test_sources_and_arguments_that_make_no_sense_are_refused(tiny, tmp_path):
    with pytest.raises(CorpusError, match="there is no file"):
        embed_corpus(tmp_path / "none.txt", tmp_path / "out", tiny)
    (tmp_path / "x.pdf").write_bytes(b"")
    with pytest.raises(CorpusError, match="cannot read this kind of file"):
        embed_corpus(tmp_path / "x.pdf", tmp_path / "out", tiny)
    with pytest.raises(CorpusError, match="has no column body; its columns are id, text"):
        embed_corpus(pa.Table.from_pylist(ROWS), tmp_path / "out", tiny, text="body")
    with pytest.raises(InputError, match="format must be"):
        embed_corpus(ROWS, tmp_path / "out", tiny, format="pdf")
    with pytest.raises(InputError, match="keep: the shards have a column row of their own"):
        embed_corpus(ROWS, tmp_path / "out", tiny, keep=["row"])
    with pytest.raises(InputError, match=r"its name must end in one of \.duckdb, "):
        embed_corpus(ROWS, tmp_path / "out", tiny, export="rows.sqlite")
    with pytest.raises(InputError, match="this one is loaded"):
        embed_corpus(ROWS, tmp_path / "out", tiny, devices=["CPU"])
    (tmp_path / "out" / "part-000000.parquet").write_bytes(b"")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(CorpusError, match="is damaged"):
        embed_corpus(ROWS, tmp_path / "out", tiny)


def test_an_empty_source_is_a_complete_job(tiny, tmp_path):
    done = embed_corpus([], tmp_path / "out", tiny)
    assert (done.n_rows, done.n_shards, done.complete) == (0, 0, True)


CHILD = """
import sys
from llamacrab import EmbedOptions, Llama
from llamacrab.corpus import embed_corpus
with Llama(sys.argv[1], n_contexts=1, n_threads=1, pack_tokens=64) as llama:
    print("ready", flush=True)
    embed_corpus(sys.argv[2], sys.argv[3], llama, keep=["id"], shard_rows=40,
                 options=EmbedOptions(truncate=True))
"""


def child(source, folder):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(gguf_path("tiny-bert")), str(source), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_job_that_is_killed_again_and_again_loses_and_repeats_nothing(tiny, expected, tmp_path):
    source, folder = write_jsonl(tmp_path / "rows.jsonl"), tmp_path / "out"
    n_kills = int(os.environ.get("LLAMACRAB_KILLS", "8"))
    n_killed = 0
    for kill in range(n_kills):
        with child(source, folder) as process:
            process.stdout.readline()
            time.sleep(0.15 * kill / n_kills)  # not at all at first: that is never too late
            process.kill()
        n_killed += process.returncode == -signal.SIGKILL
        manifest = folder / "manifest.json"
        if manifest.is_file() and json.loads(manifest.read_text())["complete"]:
            check(folder, expected, killed=True)
            shutil.rmtree(folder)  # begin anew
    with child(source, folder) as process:
        assert process.wait() == 0
    assert n_killed > 0
    check(folder, expected)


def test_ctrl_c_keeps_what_is_done(tiny, expected, tmp_path, monkeypatch):
    source, folder = write_jsonl(tmp_path / "rows.jsonl"), tmp_path / "out"
    seen = []

    def interrupt(state):
        seen.append(state["rows"])
        if state["rows"] >= 250 and len(seen) == len(set(seen)):
            raise KeyboardInterrupt

    keywords = {"keep": ["id"], "shard_rows": 130, "options": OPTIONS}
    done = embed_corpus(source, folder, tiny, on_progress=interrupt, **keywords)
    assert not done.complete
    assert 250 <= done.n_rows == seen[-1] < 700
    assert embed_corpus(source, folder, tiny, **keywords).n_resumed == done.n_rows
    check(folder, expected)


def test_two_replicas_on_devices_share_a_job(expected, tmp_path):
    model = gguf_path("tiny-bert")
    embed_corpus(
        ROWS, tmp_path / "out", model, devices=["CPU", "CPU"], keep=["id"], options=OPTIONS
    )
    check(tmp_path / "out", expected)


def test_progress_tells_the_total_and_the_time_left(tiny, tmp_path):
    seen = []
    for number, source in enumerate([write_jsonl(tmp_path / "rows.jsonl"), ROWS, iter(ROWS)]):
        seen.append([])
        embed_corpus(
            source, tmp_path / f"out-{number}", tiny, options=OPTIONS, on_progress=seen[-1].append
        )
    assert [states[-1]["total"] for states in seen] == [700, 700, None]
    assert [states[-1]["seconds_left"] for states in seen] == [0, 0, None]
    assert all(states[-1]["complete"] and states[-1]["tokens_per_second"] > 0 for states in seen)


def cli(source, folder, *more, **how):
    command = [sys.executable, "-m", "llamacrab", "embed", source, "-o", folder, "--truncate"]
    command += ["-m", gguf_path("tiny-bert"), "--keep", "id", "--shard-rows", "40", *more]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


@pytest.mark.parametrize("times", [0, 1])
def test_a_ctrl_c_that_was_held_to_the_end_is_raised_there(times):
    done = []
    with pytest.raises(KeyboardInterrupt) if times else contextlib.nullcontext(), Interrupt():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        done.append("all")
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_ctrl_c_in_a_shell_keeps_what_is_done_and_says_how_to_go_on(tiny, tmp_path):
    rows = [{"id": str(i), "text": f"{i} {'crab ' * 60}"} for i in range(8_000)]
    source, folder = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    with cli(source, folder, "--json-progress") as process:
        assert json.loads(process.stdout.readline())["total"] == 8_000
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again to resume" in said
    n_done = len(table_of(folder))
    assert 0 < n_done < 8_000
    with cli(source, folder) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"{n_done} from earlier runs" in said
    assert table_of(folder).column("id").to_pylist() == [row["id"] for row in rows]


@pytest.mark.skipif(os.name != "posix", reason="files are limited as POSIX has it")
def test_a_disk_that_fills_stops_the_job_where_it_can_go_on(tiny, expected, tmp_path):
    import resource

    # To the process, a limit on the size of files is like a disk that is full.
    source, folder = write_jsonl(tmp_path / "rows.jsonl"), tmp_path / "out"
    limit = (shard_bytes(source, tmp_path / "probe", tiny) // 2,) * 2
    with cli(
        source, folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    ) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "0 rows are finished, start again to resume" in said
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "manifest.json"]
    with cli(source, folder) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    check(folder, expected)


def shard_bytes(source, folder, llama):
    embed_corpus(source, folder, llama, keep=["id"], shard_rows=40, options=OPTIONS)
    return (folder / "part-000000.parquet").stat().st_size
