"""Jobs that go on: only what is the same job may, and by one process at a time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.ipc
import pyarrow.parquet
import pytest
from helpers import TEXTS, cosines, gguf_path

from llamacrab import EmbedOptions, Llama, _core, cli, fetch_default_model
from llamacrab._support import files as _files
from llamacrab.corpus import embed_corpus, exports, job
from llamacrab.corpus.manifest import Manifest
from llamacrab.errors import CorpusError, InputError

OPTIONS = EmbedOptions(truncate=True)
ROWS = [{"id": i, "text": f"{i} {TEXTS[i % 200][:60]}"} for i in range(60)]
KEYWORDS = {"keep": ["id"], "shard_rows": 20, "options": OPTIONS}


@pytest.fixture(scope="module")
def tiny():
    with Llama(gguf_path("tiny-bert"), n_contexts=1, n_threads=1) as llama:
        yield llama


def write_jsonl(path, rows=ROWS, how="w"):
    with path.open(how, encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_arrow(path, table):
    with pa.ipc.new_file(path, table.schema) as out:
        out.write_table(table)
    return path


def table_of(folder):
    # What readers of a folder do: the first file's schema is that of all.
    return pa.dataset.dataset(folder, exclude_invalid_files=True).to_table()


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def check(llama, folder, rows=ROWS):
    table = table_of(folder)
    assert table.column("row").to_pylist() == list(range(len(rows)))
    expected = llama.embed_texts([row["text"] for row in rows], options=OPTIONS)
    vectors = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
    assert cosines(vectors, expected).min() > 0.9999


def half_done(llama, source, folder, **changes):
    """Stop a job after its first shard."""
    stopped = []

    def stop(state):
        if not stopped:
            stopped.append(state)
            raise KeyboardInterrupt

    done = embed_corpus(source, folder, llama, on_progress=stop, **{**KEYWORDS, **changes})
    assert not done.complete
    return done


# ------------------------------------------------------------------------------------ the same job


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"n_ctx": 32}, "n_ctx: 128 there, 32 now"),
        ({"deterministic": True}, "deterministic: False there, True now"),
        ({"cpu_backend": "ggml"}, r"backends: \['llamacrab .*'\] there, \['ggml'\] now"),
    ],
)
def test_a_model_that_would_give_other_rows_does_not_go_on(tmp_path, changes, what):
    if "cpu_backend" in changes and _core.kernels() is None:
        pytest.skip("a build without kernels has one backend")
    backend = "ggml" if _core.kernels() is None else "llamacrab"
    # The matrices of tiny models are too small for products in 8 bits.
    in_8_bits = changes.get("cpu_backend") == "int8"
    model = fetch_default_model() if in_8_bits else gguf_path("tiny-bert")
    given = {"n_contexts": 1, "n_threads": 1, "cpu_backend": backend}
    with Llama(model, **given) as llama, Llama(model, **{**given, **changes}) as changed:
        if in_8_bits and changed.backends == llama.backends:
            pytest.skip("this CPU does not multiply in 8 bits: the rows are the same")
        half_done(llama, ROWS, tmp_path / "out")
        with pytest.raises(CorpusError, match=what):
            embed_corpus(ROWS, tmp_path / "out", changed, **KEYWORDS)


@pytest.mark.skipif(_core.kernels() is None, reason="a build without kernels has one backend")
def test_a_setting_that_has_no_effect_on_this_model_goes_on(tmp_path):
    model = gguf_path("tiny-bert")  # whose matrices are too narrow for 8 bits
    with Llama(model, n_contexts=1, cpu_backend="llamacrab") as llama:
        half_done(llama, ROWS, tmp_path / "out")
    with Llama(model, n_contexts=1, cpu_backend="int8") as llama:
        assert embed_corpus(ROWS, tmp_path / "out", llama, **KEYWORDS).complete


def test_what_only_changes_the_speed_goes_on(tiny, tmp_path):
    done = half_done(tiny, ROWS, tmp_path / "out")
    flash_attn = tiny.layout.flash_attn if tiny.backends != ["ggml"] else False
    with Llama(
        gguf_path("tiny-bert"), n_contexts=2, n_threads=2, pack_tokens=96, flash_attn=flash_attn
    ) as other:
        again = embed_corpus(
            ROWS, tmp_path / "out", other, keep=["id"], shard_rows=7, options=OPTIONS
        )
    assert (again.n_resumed, again.n_rows, again.complete) == (done.n_rows, 60, True)
    check(tiny, tmp_path / "out")


def test_a_larger_limit_is_a_way_out_where_a_text_was_too_long(tmp_path):
    rows = [*ROWS[:30], {"id": 30, "text": "long " * 100}]
    keywords = {**KEYWORDS, "options": EmbedOptions()}
    with (
        Llama(gguf_path("tiny-bert"), n_ctx=64) as llama,
        pytest.raises(CorpusError, match="row 30: the text has 102 tokens"),
    ):
        embed_corpus(rows, tmp_path / "out", llama, **{**keywords, "shard_rows": 10})
    with Llama(gguf_path("tiny-bert")) as llama:
        assert embed_corpus(rows, tmp_path / "out", llama, **keywords).n_rows == 31


def test_an_edit_in_the_middle_of_a_large_file_is_seen(tiny, tmp_path):
    rows = [{"id": i, "text": f"{i} crab", "more": "x" * 50_000} for i in range(60)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert source.stat().st_size > 2.5 * 2**20
    embed_corpus(source, tmp_path / "out", tiny, **KEYWORDS)
    rows[30]["text"] = "30 carb"
    write_jsonl(source, rows)
    with pytest.raises(CorpusError, match=r"source: rows\.jsonl: other content"):
        embed_corpus(source, tmp_path / "out", tiny, **KEYWORDS)


def test_a_model_is_known_by_all_of_its_files_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path / "cache"))
    parts = [tmp_path / f"big-{k:05}-of-00002.gguf" for k in (1, 2)]
    for part in parts:
        part.write_bytes(bytes(3 << 20))
        os.utime(part, ns=(0, 0))
    before = _files.model_hashes(parts[0])
    assert len(before) == 2
    with parts[1].open("r+b") as file:
        file.seek(3 << 19)
        file.write(b"x")
    os.utime(parts[1], ns=(0, 0))
    assert _files.model_hashes(parts[0]) == before  # size, time and inode are trusted
    os.utime(parts[1], ns=(0, 1))
    after = _files.model_hashes(parts[0])
    assert (after[0], after[1] != before[1]) == (before[0], True)
    (tmp_path / "cache" / "hashes.json").write_text("[1]")
    assert _files.model_hashes(parts[0]) == after


def test_a_model_that_has_just_been_written_is_read_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "new.gguf"
    model.write_bytes(b"one")
    before, stamp = _files.model_hashes(model), model.stat().st_mtime_ns
    model.write_bytes(b"two")
    os.utime(model, ns=(stamp, stamp))
    assert _files.model_hashes(model) != before


@pytest.mark.parametrize("n_done", [20, 60])
def test_rows_from_python_are_compared_when_a_job_goes_on(tiny, tmp_path, n_done):
    if n_done == 20:
        half_done(tiny, iter(ROWS), tmp_path / "out")
    else:
        embed_corpus(iter(ROWS), tmp_path / "out", tiny, **KEYWORDS)
    before = shards_of(tmp_path / "out")
    for k, name in ((3, "text"), (5, "id")):
        others = [*ROWS[:k], {**ROWS[k], name: "other"}, *ROWS[k + 1 :]]
        with pytest.raises(
            CorpusError, match=r"rows 0 to 19 of the source are not the rows of part"
        ):
            embed_corpus(others, tmp_path / "out", tiny, **KEYWORDS)
    with pytest.raises(CorpusError, match=r"has 10 rows, but .. are finished"):
        embed_corpus(ROWS[:10], tmp_path / "out", tiny, **KEYWORDS)
    assert shards_of(tmp_path / "out") == before
    # The same rows of another type are the same rows.
    assert embed_corpus(pa.Table.from_pylist(ROWS), tmp_path / "out", tiny, **KEYWORDS).complete
    check(tiny, tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_not_called_complete(tiny, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl")

    def grow(state):
        if state["rows"] == 60 and not state["complete"]:
            write_jsonl(source, [{"id": 60, "text": "late"}], "a")

    with pytest.raises(CorpusError, match=r"rows\.jsonl changed while it was read"):
        embed_corpus(source, tmp_path / "out", tiny, on_progress=grow, **KEYWORDS)
    done = embed_corpus(source, tmp_path / "out", tiny, append=True, **KEYWORDS)
    assert done.complete
    assert done.n_rows == len(source.read_text().splitlines())


# ------------------------------------------------------------------------------------ appending


def grown_sources(tmp_path):
    """Yield sources, and a call that adds rows to each and returns it."""
    more = [{"id": 60 + i, "text": f"{i} more"} for i in range(15)]
    tables = [pa.Table.from_pylist(rows) for rows in (ROWS, more)]

    jsonl = write_jsonl(tmp_path / "rows.jsonl")
    yield jsonl, lambda: write_jsonl(jsonl, more, "a")

    packed = tmp_path / "rows.jsonl.gz"
    lines = ["".join(json.dumps(row) + "\n" for row in rows).encode() for rows in (ROWS, more)]
    packed.write_bytes(gzip.compress(lines[0]))
    yield packed, lambda: packed.write_bytes(gzip.compress(lines[0] + lines[1])) and packed

    pattern = str(tmp_path / "*.parquet")
    pa.parquet.write_table(tables[0], tmp_path / "a.parquet")
    yield pattern, lambda: pa.parquet.write_table(tables[1], tmp_path / "b.parquet") or pattern

    single = tmp_path / "rows.arrow"
    write_arrow(single, tables[0])
    both = pa.concat_tables(tables)
    yield single, lambda: write_arrow(single, both)

    yield list(ROWS), lambda: [*ROWS, *more]
    yield tables[0].to_pandas(), lambda: both.to_pandas()


def test_rows_that_were_added_are_embedded_with_append_alone(tiny, tmp_path):
    for k, (source, grow) in enumerate(grown_sources(tmp_path)):
        folder = tmp_path / f"out-{k}"
        embed_corpus(source, folder, tiny, append=True, **KEYWORDS)
        before = shards_of(folder)
        grown = grow()
        with pytest.raises(CorpusError, match=r"append=True \(--append\)"):
            embed_corpus(grown, folder, tiny, **KEYWORDS)
        assert shards_of(folder) == before
        done = embed_corpus(grown, folder, tiny, append=True, **KEYWORDS)
        assert (done.n_resumed, done.n_rows, done.complete) == (60, 75, True)
        assert shards_of(folder).items() > before.items()
        assert table_of(folder).column("id").to_pylist() == list(range(75))
        assert embed_corpus(grown, folder, tiny, **KEYWORDS).n_resumed == 75


def test_append_refuses_rows_that_are_no_longer_what_they_were(tiny, tmp_path):
    source = tmp_path / "lines.txt"
    source.write_text("one\ntwo\nthr")
    embed_corpus(source, tmp_path / "out", tiny, append=True)
    before = shards_of(tmp_path / "out"), (tmp_path / "out" / "manifest.json").read_bytes()
    for text in ("one\nTWO\nthr\nfour\n", "one\ntwo\nthree\nfour\n", "one\n"):
        source.write_text(text)
        with pytest.raises(
            CorpusError, match=r"of the source are not the rows of|the source has 1 rows"
        ):
            embed_corpus(source, tmp_path / "out", tiny, append=True)
    now = shards_of(tmp_path / "out"), (tmp_path / "out" / "manifest.json").read_bytes()
    assert now == before
    with pytest.raises(CorpusError, match="options: "):
        embed_corpus(source, tmp_path / "out", tiny, append=True, options=OPTIONS)
    with pytest.raises(InputError, match="overwrite and append exclude each other"):
        embed_corpus(source, tmp_path / "out", tiny, append=True, overwrite=True)


def test_the_command_line_appends(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    source, folder = write_jsonl(tmp_path / "rows.jsonl"), tmp_path / "out"
    command = ["embed", source, "-o", folder, "-m", gguf_path("tiny-bert"), "--truncate"]
    command = [str(part) for part in command]
    assert cli.run(command) == 0
    write_jsonl(source, [{"text": "more"}], "a")
    assert cli.run(command) == 1
    assert "--append" in capsys.readouterr().err
    assert cli.run([*command, "--append"]) == 0
    assert "61 texts in 2 files" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ one at a time


def test_a_second_run_is_told_which_process_is_at_work(tiny, tmp_path):
    folder, said = tmp_path / "out", []

    def rows():
        for row in ROWS:
            if row["id"] == 30:
                with pytest.raises(CorpusError) as info:
                    embed_corpus(ROWS, folder, tiny, overwrite=True, **KEYWORDS)
                said.append(str(info.value))
            yield row

    embed_corpus(rows(), folder, tiny, **KEYWORDS)
    assert f"{folder} is in use by process {os.getpid()} on " in said[0]
    assert ", since 20" in said[0]
    assert "\n" not in said[0]
    check(tiny, folder)
    assert sorted(path.name for path in folder.glob(".*")) == [".lock"]


CHILD = """
import sys
from llamacrab import EmbedOptions, Llama, LlamaError
from llamacrab.corpus import embed_corpus
with Llama(sys.argv[1], n_contexts=1, n_threads=1, pack_tokens=64) as llama:
    try:
        embed_corpus(sys.argv[2], sys.argv[3], llama, keep=["id"], shard_rows=20,
                     options=EmbedOptions(truncate=True))
    except LlamaError as error:
        sys.exit(str(error))
"""


def test_runs_that_overlap_do_not_touch_each_others_shards(tiny, tmp_path):
    rows = [{"id": i, "text": f"{i} {TEXTS[i % 200][:60]}"} for i in range(400)]
    source, folder = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = [sys.executable, "-c", CHILD, gguf_path("tiny-bert"), source, folder]
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(
                subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]
        said = [run.communicate()[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes, said
    for code, line in zip(codes, said, strict=True):
        assert code == 0 or "is in use by " in line
    check(tiny, folder, rows)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_no_manifest_lists_is_never_removed(tiny, tmp_path, overwrite):
    folder = tmp_path / "out"
    embed_corpus(ROWS, folder, tiny, **KEYWORDS)
    foreign = folder / "part-000007.parquet"
    foreign.write_bytes(b"precious")
    with pytest.raises(
        CorpusError, match=r"holds part-000007\.parquet, which its manifest does not"
    ):
        embed_corpus(ROWS, folder, tiny, overwrite=overwrite, **KEYWORDS)
    assert foreign.read_bytes() == b"precious"
    foreign.unlink()
    assert embed_corpus(ROWS, folder, tiny, **KEYWORDS).n_resumed == 60


def test_overwriting_where_the_manifest_cannot_be_read_removes_no_shards(tiny, tmp_path):
    folder = tmp_path / "out"
    embed_corpus(ROWS, folder, tiny, **KEYWORDS)
    before = shards_of(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CorpusError, match=r"holds part-000000\.parquet and 2 more, which its"):
        embed_corpus(ROWS, folder, tiny, overwrite=True, **KEYWORDS)
    assert shards_of(folder) == before


# ------------------------------------------------------------------------------------ beginnings


def test_a_job_that_failed_before_its_first_shard_does_not_block_its_folder(tiny, tmp_path):
    bad = [{"id": 0, "text": "long " * 500}, *ROWS]
    with pytest.raises(CorpusError, match="row 0: the text has 502 tokens"):
        embed_corpus(bad, tmp_path / "out", tiny, options=EmbedOptions(normalize=False))
    assert embed_corpus(ROWS, tmp_path / "out", tiny, **KEYWORDS).n_rows == 60
    check(tiny, tmp_path / "out")


# ------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("values", [(1, 2.5), (None, "a"), (None, 3), ([], [0.5])])
def test_a_column_whose_type_widens_has_one_type_in_all_shards(tiny, tmp_path, kind, values):
    rows = [{"text": f"{i}", "value": values[i >= 2000]} for i in range(2100)]
    folder = tmp_path / "out"
    done = embed_corpus(rows, folder, tiny, keep=["value"], shard_rows=1024, format=kind)
    assert (done.n_rows, done.n_shards) == (2100, 3)
    found = pa.dataset.dataset(sorted(folder.glob("part-*")), format=kind.replace("arrow", "ipc"))
    assert found.to_table().column("value").to_pylist() == [row["value"] for row in rows]
    assert (
        embed_corpus(rows, folder, tiny, keep=["value"], shard_rows=1024, format=kind).n_resumed
        == 2100
    )


def test_files_whose_columns_have_other_types_are_one_job(tiny, tmp_path):
    paths = [tmp_path / f"{k}.parquet" for k in range(3)]
    for path, values in zip(paths, ([1, 2], [2.5, 3.5], [None, None]), strict=True):
        pa.parquet.write_table(pa.table({"text": ["a", "b"], "value": values}), path)
    embed_corpus(paths, tmp_path / "out", tiny, keep=["value"], shard_rows=2)
    assert table_of(tmp_path / "out").column("value").to_pylist() == [1, 2, 2.5, 3.5, None, None]


@pytest.mark.parametrize("rows_before", [0, 1024])
def test_a_value_that_does_not_fit_its_column_makes_its_row_wrong(tiny, tmp_path, rows_before):
    rows = [{"text": f"{i}", "value": 2**60} for i in range(rows_before)]
    rows += [{"text": "a", "value": 2**60 + 1}, {"text": "b", "value": "x"}]
    rows += [{"text": "c", "value": 2**70}, {"text": "d", "value": 0.5}, {"text": "e", "value": 7}]
    first = rows_before + 1
    with pytest.raises(CorpusError, match=f"row {first}: column value: 'x' does not fit int64"):
        embed_corpus(rows, tmp_path / "fail", tiny, keep=["value"])
    folder = tmp_path / "skip"
    done = embed_corpus(rows, folder, tiny, keep=["value"], on_error="skip")
    assert (done.n_rows, done.n_rejected) == (len(rows) - 3, 3)
    assert table_of(folder).column("value").to_pylist()[rows_before:] == [2**60 + 1, 7]
    listed = (folder / "part-000000.rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] - first for line in listed] == [0, 1, 2]


def test_a_job_that_stops_while_types_are_widened_goes_on(tiny, tmp_path, monkeypatch):
    rows = [{"text": f"{i}", "value": i if i < 60 else 0.5} for i in range(61)]
    # Blocks of a source have 1024 rows; tables have those that they were made of.
    table = pa.concat_tables(
        [pa.Table.from_pylist(rows[:60]), pa.Table.from_pylist(rows[60:])],
        promote_options="permissive",
    )
    parts = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    pa.parquet.write_table(pa.Table.from_pylist(rows[:60]), parts[0])
    pa.parquet.write_table(pa.Table.from_pylist(rows[60:]), parts[1])
    settle, left = job.settle, [1]

    def fail(partial, whole):
        settle(partial, whole)
        if not left[0]:
            raise OSError(5, "the disk is gone")
        left[0] -= 1

    monkeypatch.setattr(job, "settle", fail)
    keywords = {"keep": ["value"], "shard_rows": 20}
    with pytest.raises(OSError, match="the disk is gone"):
        embed_corpus(parts, tmp_path / "out", tiny, **keywords)
    monkeypatch.undo()
    assert embed_corpus(parts, tmp_path / "out", tiny, **keywords).n_resumed == 61
    assert table_of(tmp_path / "out").column("value").equals(table.column("value"))


# ------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("times", [1, 2, 3])
def test_ctrl_c_while_a_shard_is_counted_in_counts_it_once(tiny, tmp_path, monkeypatch, times):
    folder, save, sent = tmp_path / "out", Manifest.save, []

    def interrupted(manifest, where):
        if len(manifest.shards) == 1 and len(sent) < times:
            for _ in range(times):
                sent.append(signal.raise_signal(signal.SIGINT))
        save(manifest, where)

    monkeypatch.setattr(Manifest, "save", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        embed_corpus(ROWS, folder, tiny, **KEYWORDS)
    assert len(sent) == times
    monkeypatch.undo()
    embed_corpus(ROWS, folder, tiny, **KEYWORDS)
    check(tiny, folder)


def test_ctrl_c_stops_a_job_whose_source_does_not_answer(tiny, tmp_path):
    def rows():
        yield from ROWS
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the source was asked for more")
        yield None

    assert not embed_corpus(rows(), tmp_path / "out", tiny, **KEYWORDS).complete


@pytest.mark.skipif(os.name != "posix", reason="folders are synchronised as POSIX has it")
def test_an_export_is_on_the_disk_before_the_manifest_says_that_it_is_there(
    tiny, tmp_path, monkeypatch
):
    fsync, save, synced, wanted = os.fsync, Manifest.save, set(), []

    def write(rows, path):
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "data").write_text(str(rows.count_rows()))

    def recorded(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def saved(manifest, folder):
        if any(manifest.exports.values()):
            target = Path(next(iter(manifest.exports)))
            wanted.extend([target, target / "inner", target / "inner" / "data", target.parent])
            assert {path.stat().st_ino for path in wanted} <= synced
        save(manifest, folder)

    monkeypatch.setitem(exports._WRITERS, ".tree", ("json", write))
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Manifest, "save", saved)
    embed_corpus(ROWS, tmp_path / "out", tiny, export=tmp_path / "rows.tree", **KEYWORDS)
    assert wanted
    assert (tmp_path / "rows.tree" / "inner" / "data").read_text() == "60"
