"""Ray Data calls llamacrab: real Ray, two workers, Parquet in and Parquet out."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TEXTS, check_python, gguf_path

from llamacrab import errors
from llamacrab.integrations.ray import Embedder

# In a process of its own: Ray leaves processes and warnings behind.
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import os, numpy as np, pyarrow.parquet, ray
from llamacrab import EmbedOptions
from llamacrab.integrations.ray import Embedder
model, source, target, n_workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
class Traced(Embedder):
    def __call__(self, batch):
        return {**super().__call__(batch), "worker": np.full(len(batch["id"]), os.getpid())}
ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
ray.data.read_parquet(source).repartition(8).map_batches(
    Traced,
    fn_constructor_kwargs={"model": model, "options": EmbedOptions(truncate=True)},
    batch_size=64,
    compute=ray.data.ActorPoolStrategy(size=n_workers),
    num_cpus=1,
).write_parquet(target)
ray.shutdown()
"""


@pytest.fixture(scope="module")
def embedder():
    made = Embedder(gguf_path("tiny-bert"), text="body", n_contexts=1, n_threads=1)
    yield made
    made._llama.close()


@pytest.mark.parametrize("kind", [object, str])
def test_a_batch_comes_back_with_a_column_of_vectors(embedder, load, kind):
    batch = {"id": np.arange(3), "body": np.array(TEXTS[:3], dtype=kind)}
    done = embedder(batch)
    assert list(done) == ["id", "body", "embedding"]
    expected = load("tiny-bert").embed_texts(TEXTS[:3])
    np.testing.assert_allclose(done["embedding"], expected, atol=1e-6)


@pytest.mark.parametrize("null", [None, float("nan")])
def test_mnf_48_a_null_is_refused_and_not_embedded_by_its_name(embedder, null):
    with pytest.raises(errors.InputError, match="text 1 is missing"):
        embedder({"body": np.array(["a crab", null], dtype=object)})


@pytest.mark.parametrize("column", [np.arange(2), np.array([1.5, np.nan]), np.array([b"a"])])
def test_a_column_that_holds_no_texts_is_refused(embedder, column):
    with pytest.raises(errors.InputError, match=r"text 0 is (int|float|bytes), not str"):
        embedder({"body": column})


def test_a_column_that_is_not_there_is_named_with_those_that_are(embedder):
    with pytest.raises(errors.InputError, match=r"no column 'body' .* its columns are id, text"):
        embedder({"id": np.arange(1), "text": np.array(["a crab"])})


def test_two_workers_give_the_rows_of_one_process(tmp_path, load):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import pyarrow as pa
    import pyarrow.parquet

    texts = [f"{i} {TEXTS[i % 200]}" for i in range(600)]
    source = tmp_path / "in.parquet"
    pa.parquet.write_table(pa.table({"id": range(600), "text": texts}), source)
    check_python(
        SCRIPT, gguf_path("tiny-bert"), source, tmp_path / "out", 2, timeout=170, RAY_DEDUP_LOGS="0"
    )
    table = pa.parquet.read_table(tmp_path / "out").sort_by("id")
    assert table.column("id").to_pylist() == list(range(600))
    assert len(set(table.column("worker").to_pylist())) == 2
    rows = np.array(table.column("embedding").to_pylist(), dtype=np.float32)
    expected = load("tiny-bert").embed_texts(texts, truncate=True)
    assert (rows * expected).sum(axis=1).min() > 0.9999
