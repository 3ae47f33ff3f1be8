"""How fast a model is embedded here, and whether it has got slower: ``llamacrab bench``.

`run` measures in worker processes (`worker`, which runs `cases` on `workloads`), `statistics`
compares, `report` shows. Nothing here is imported unless a bench is run.
"""
