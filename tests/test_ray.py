"""Ray Data calls llamacrab: real Ray, two workers, Parquet in and Parquet out."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TEXTS, check_python, gguf_path

pytest.importorskip("ray", reason="the extra `ray` is not installed")

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


def test_two_workers_give_the_rows_of_one_process(tmp_path, load):
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
