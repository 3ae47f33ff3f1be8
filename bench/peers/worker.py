"""A process with one peer, that embeds on demand: a line of JSON in, a line of JSON out.

    python worker.py SCRIPT

SCRIPT holds a class `Peer`, which is all that a peer has to write:

    load(files, **settings)   get ready; returns its name and version
    embed(texts)              returns the normalised vectors, (n, n_embd) float32
    settings()                if it finds its settings itself: what they are now

Nothing here needs llamacrab: most peers live in an environment without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    script = Path(sys.argv[1])
    # Answers have standard output for themselves: what C++ prints goes where errors go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer = module.Peer()
    texts: list[str] = []
    how: dict[str, Any] = {}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if "load" in command:
                answer["about"] = peer.load(command["files"], **command["load"])
            elif "texts" in command:
                texts = json.loads(Path(command["texts"]).read_text(encoding="utf-8"))
                how = command["how"]
            elif "settings" in command:
                answer["settings"] = peer.settings() if hasattr(peer, "settings") else ""
            else:
                start = time.perf_counter()
                vectors = peer.embed(texts, **how)
                answer["seconds"] = time.perf_counter() - start
                if command["vectors"]:
                    np.save(command["vectors"], vectors)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
