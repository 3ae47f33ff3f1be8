"""``llamacrab bench``: measure the speed of a model on this machine, and find regressions.

`run` measures in worker processes (`worker`, which runs `cases` on `workloads`), `statistics`
compares, `report` shows results. This package is only imported to run a benchmark.
"""
