"""Reading texts: every kind of file the same way, and what is wrong said with its place."""

from __future__ import annotations

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from helpers import check_python, python

from llamacrab.corpus.sources import Source
from llamacrab.errors import CorpusError

TEXTS = ["a crab", "two\nlines", 'quoted, "twice"', "ein Krebs für alle"]


def read(path, text="body", **how):
    blocks = list(Source(path, text=text, **how).blocks(0))
    for block in blocks:
        block.refuse_wrong()
    return [text for block in blocks for text in block.texts]


def write(path, data, opener=open):
    with opener(path, "wb") as file:
        file.write(data)
    return path


CSV = 'id,body\n1,a crab\n2,"two\nlines"\n3,"quoted, ""twice"""\n4,ein Krebs für alle\n'.encode()
JSONL = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()


def kinds(folder):
    """Write the same texts as every kind of file."""
    table = pa.table({"body": TEXTS})
    pa.parquet.write_table(table, folder / "a.parquet")
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as out:
        out.write_table(table)
    with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as out:
        out.write(JSONL)
    write(folder / "a.csv", CSV)
    write(
        folder / "a.tsv",
        b'body\na crab\n"two\nlines"\n"quoted, ""twice"""\nein Krebs f\xc3\xbcr alle\n',
    )
    write(folder / "a.csv.gz", CSV, gzip.open)
    write(folder / "a.ndjson", JSONL)
    write(folder / "a.jsonl.bz2", JSONL, bz2.open)
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    paths = kinds(tmp_path)
    assert len(paths) == 8
    for path in paths:
        assert read(path) == TEXTS, path


def test_files_without_tables_are_read_without_pyarrow(tmp_path):
    for path in kinds(tmp_path):
        if path.suffix not in (".parquet", ".arrow", ".zst"):
            continue
        path.unlink()
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from llamacrab.corpus.sources import Source\n"
        "for path in sys.argv[1:]:\n"
        "    print(sum((b.texts for b in Source(path, text='body').blocks(0)), []))"
    )
    lines = check_python(code, *sorted(tmp_path.iterdir())).splitlines()
    assert lines == [str(TEXTS)] * 5


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_what_needs_pyarrow_names_the_extra(tmp_path, name):
    kinds(tmp_path)
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from llamacrab.corpus.sources import Source\n"
        "list(Source(sys.argv[1], text='body').blocks(0))"
    )
    assert "pip install 'llamacrab[corpus]'" in python(code, tmp_path / name).stderr


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,text\n1,x\n", r"^a\.csv has no column body; its columns are id, text$"),
        ("a.tsv", b"id\ttext\n1\tx\n", r"^a\.tsv has no column body; its columns are id, text$"),
        ("a.csv", b"", r"^a\.csv: line 1 is empty"),
        ("a.csv", b"body,body\n1,2\n", r"^a\.csv: several columns are called body$"),
        ("a.csv", "body\n".encode("utf-16"), r"^a\.csv: cannot read the names of its columns"),
        ("a.csv", b"id,body\n1,x\n2,\n", r"^row 1: a\.csv, line 3: .* column 'body' is empty$"),
        ("a.csv", b"id,body\n1,x\n2\n", r"^row 1: a\.csv, line 3: 1 values, but 2 columns$"),
        ("a.csv", b"body\nx\n\xff\n", r"^row 1: a\.csv, line 3: not UTF-8$"),
        ("a.jsonl", b'{"body": "x"}\n{"a": 1, "b": 2}\n', r"^row 1: a\.jsonl, line 2: .* a, b$"),
        ("a.jsonl", b'{"body": "x"}\n{"body": null}\n', r"^row 1: a\.jsonl, line 2: .* null$"),
        ("a.jsonl", b'{"body": "x"}\n{"body": 7}\n', r"^row 1: a\.jsonl, line 2: .* int, not str$"),
        ("a.jsonl", b'{"body": "x"}\n' + b"[" * 99_999, r"^row 1: a\.jsonl, line 2: no JSON"),
        ("a.txt", b"fine\n\xff\n", r"^row 1: a\.txt, line 2: not UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"body": "x"}\n', mtime=0)[:-6],
            r"^cannot read beyond row 0: ",
        ),
        ("a.jsonl.gz", b"no gzip", r"^cannot read beyond row 0: .*[Gg]zip"),
        ("a.parquet", b"no parquet", r"^cannot read beyond row 0: "),
        ("a.parquet.gz", b"", r"tables are not read compressed"),
        ("a.xlsx", b"", r"cannot read this kind of file; known are \.txt, .*--input-format"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(tmp_path, name, data, message):
    with pytest.raises(CorpusError, match=message):
        read(write(tmp_path / name, data))


def test_nulls_and_missing_columns_of_a_table_are_refused_by_their_row(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"body": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(CorpusError, match=r"^row 1: a\.parquet: there is no text: it is null$"):
        read(path)
    with pytest.raises(CorpusError, match=r"^row 0: a\.parquet: the text is int, not str$"):
        read(path, "n")
    with pytest.raises(CorpusError, match=r"^a\.parquet has no column x; its columns are body, n$"):
        read(path, "x")


def test_a_name_that_is_there_is_no_pattern(tmp_path):
    write(tmp_path / "a1.txt", b"the pattern\n")
    assert read(str(tmp_path / "a[1].txt")) == ["the pattern"]
    write(tmp_path / "a[1].txt", b"the name\n")
    assert read(str(tmp_path / "a[1].txt")) == ["the name"]
    with pytest.raises(CorpusError, match=r"is a folder: name its files"):
        read(tmp_path)


def test_a_kind_that_is_given_counts_more_than_the_name(tmp_path):
    assert read(write(tmp_path / "export.dat", CSV), kind="csv") == TEXTS
    assert read(write(tmp_path / "lines.csv", b"a\nb\n"), kind="lines") == ["a", "b"]
    assert read(write(tmp_path / "noname", b"a\nb\n")) == ["a", "b"]


def test_plain_lines_have_no_columns_to_keep(tmp_path):
    with pytest.raises(CorpusError, match="plain texts have no column id to keep"):
        read(write(tmp_path / "a.txt", b"x\n"), keep=("id",))


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"body": "a\\ud800b", "id": "\\udc00"}\n')
    assert read(path, keep=("id",)) == ["a\ufffdb"]
    assert read(write(path, b'{"body": "\\ud83e\\udd80"}\n')) == ["\U0001f980"]
