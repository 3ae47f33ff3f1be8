"""Two Ray Data workers over one, one CPU each, from Parquet to Parquet.

    python bench/ray_workers.py [--texts 4000] [--rounds 3]

On the default model, and on a local cluster that is started once: what is timed is the job, with
the start of its actors, each of which loads the model.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from alternate import compare, seconds

from llamacrab.bench.workloads import sentences
from llamacrab.integrations.ray import Embedder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import ray

    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.parquet"
        texts = sentences()
        table = pa.table({"text": [texts[i % len(texts)] for i in range(args.texts)]})
        pa.parquet.write_table(table, source)

        def job(n_workers: int) -> None:
            # Ray reads so small a source as one block, which is one worker's.
            ray.data.read_parquet(source).repartition(16).map_batches(
                Embedder,
                batch_size=256,
                compute=ray.data.ActorPoolStrategy(size=n_workers),
                num_cpus=1,
            ).write_parquet(Path(name) / f"out-{n_workers}", mode="overwrite")

        runs = {f"{n} workers": lambda n=n: seconds(lambda: job(n)) for n in (2, 1)}
        compare("two Ray workers over one", args.texts, runs, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
