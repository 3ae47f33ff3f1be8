"""Make tests/data/similarity.json: what sentence-transformers' functions give for a few vectors."""

from __future__ import annotations

import json

import numpy as np
from common import DATA
from sentence_transformers import util

NAMES = ("cos_sim", "dot_score", "euclidean_sim")


def main() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.round(rng.normal(size=(4, 6)) * scale, 3).astype(np.float32) for scale in (1, 5))
    golden = {"a": a.tolist(), "b": b.tolist()}
    for name in NAMES:
        golden[name] = getattr(util, name)(a, b).tolist()
        golden[f"pairwise_{name}"] = getattr(util, f"pairwise_{name}")(a, b).tolist()
    (DATA / "similarity.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
