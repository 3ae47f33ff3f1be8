"""A finished job as a database or an index, and sources that need packages of their own."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TEXTS, gguf_path

from llamacrab import EmbedOptions, Llama, embed_corpus
from llamacrab.errors import CorpusError, InputError

OPTIONS = EmbedOptions(truncate=True)
ROWS = [{"id": f"t{i}", "text": f"{i} {TEXTS[i % 200][:60]}"} for i in range(200)]
QUERY = ROWS[7]["text"]


@pytest.fixture(scope="module")
def tiny():
    with Llama(gguf_path("tiny-bert"), n_contexts=2) as llama:
        yield llama


def embed(llama, folder, target, rows=ROWS, **changes):
    keywords = {"keep": ["id"], "shard_rows": 80, "options": OPTIONS, **changes}
    return embed_corpus(rows, folder, llama, export=target, **keywords)


def test_a_duckdb_export_finds_the_nearest_row(tiny, tmp_path):
    duckdb = pytest.importorskip("duckdb", reason="the extra `indexes` is not installed")
    embed(tiny, tmp_path / "out", tmp_path / "rows.duckdb")
    query = tiny.embed(QUERY, options=OPTIONS)
    with duckdb.connect(str(tmp_path / "rows.duckdb"), read_only=True) as database:
        found = database.execute(
            "SELECT id, row FROM embeddings "
            f"ORDER BY array_cosine_similarity(embedding, ?::FLOAT[{len(query)}]) DESC LIMIT 1",
            [query.tolist()],
        ).fetchone()
        assert found == ("t7", 7)
        assert database.execute("SELECT count(*) FROM embeddings").fetchone() == (200,)


def test_a_lancedb_export_finds_the_nearest_row(tiny, tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="the extra `indexes` is not installed")
    embed(tiny, tmp_path / "out", tmp_path / "rows.lancedb", format="arrow")
    table = lancedb.connect(tmp_path / "rows.lancedb").open_table("embeddings")
    assert table.count_rows() == 200
    query = tiny.embed(QUERY, options=OPTIONS)
    [best] = table.search(query).distance_type("cosine").limit(1).to_list()
    assert (best["id"], best["row"]) == ("t7", 7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "ubinary"])
def test_a_usearch_export_finds_the_nearest_row(tiny, tmp_path, dtype):
    index_module = pytest.importorskip(
        "usearch.index", reason="the extra `indexes` is not installed"
    )
    options = EmbedOptions(truncate=True, dtype=dtype)
    embed(tiny, tmp_path / "out", tmp_path / "rows.usearch", options=options)
    index = index_module.Index.restore(tmp_path / "rows.usearch")
    assert len(index) == 200
    assert 7 in index.search(tiny.embed(QUERY, options=options), 5).keys


def test_an_export_is_made_once_and_replaces_nothing_of_others(tiny, tmp_path):
    pytest.importorskip("usearch", reason="the extra `indexes` is not installed")
    target = tmp_path / "rows.usearch"
    target.write_bytes(b"precious")
    with pytest.raises(CorpusError, match="exists already"):
        embed(tiny, tmp_path / "out", target)
    with pytest.raises(CorpusError, match="exists already"):
        embed(tiny, tmp_path / "out", target, overwrite=True)
    assert target.read_bytes() == b"precious"
    target.unlink()
    embed(tiny, tmp_path / "out", target)
    made = target.stat().st_mtime_ns
    embed(tiny, tmp_path / "out", target)
    assert target.stat().st_mtime_ns == made
    (tmp_path / "out" / "part-000002.parquet").unlink()
    embed(tiny, tmp_path / "out", target)
    assert target.stat().st_mtime_ns != made
    embed(tiny, tmp_path / "out", target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.usearch"]
    with pytest.raises(InputError, match="usearch takes dtype"):
        embed(
            tiny, tmp_path / "bits", tmp_path / "bits.usearch", options=EmbedOptions(dtype="binary")
        )
    with pytest.raises(InputError, match="shards in npy cannot be exported"):
        embed(tiny, tmp_path / "npy", tmp_path / "npy.usearch", format="npy")


def test_a_hugging_face_dataset_is_a_source(tiny, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package `datasets` is not installed")
    rows = datasets.Dataset.from_list(ROWS)
    seen = []
    done = embed(tiny, tmp_path / "out", (), rows, format="npy", on_progress=seen.append)
    assert (done.n_rows, seen[-1]["total"]) == (200, 200)
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))])
    expected = tiny.embed_texts([row["text"] for row in ROWS], options=OPTIONS)
    np.testing.assert_allclose(found, expected, atol=1e-2)
