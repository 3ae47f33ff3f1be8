"""A process that runs cases on demand: it reads and answers lines of JSON.

So two workers, with different builds or models, can be measured alternately.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from llamacrab import _core
from llamacrab._support.versions import __version__
from llamacrab.bench.cases import Cases


def main() -> None:
    """Answer commands until standard input ends. The first command says which model to load."""
    answers, sys.stdout = sys.stdout, sys.stderr
    cases: Cases | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if cases is None:
                cases = Cases(command["model"], seconds=command["seconds"], **command["how"])
                answer: Any = _about(cases)
            elif "case" in command:
                answer = asdict(cases.run(command["case"]))
            else:
                answer = {"peak_rss": _peak_rss()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _about(cases: Cases) -> dict[str, Any]:
    llama, model = cases.llama, cases.llama.model
    n_table = model.n_embd * (len(model.vocab) + model.has_position_table * model.n_ctx_train)
    return {
        "cases": list(cases.by_name),
        "model": model.path,
        "desc": model.desc,
        # Operations per token, without the look-up of its embedding.
        "flops_per_token": 2 * max(0, model.n_params - n_table),
        "layout": {
            "n_contexts": llama.layout.n_contexts,
            "n_threads": llama.layout.n_threads,
            "pack_tokens": llama.layout.pack_tokens,
            "flash_attn": llama.layout.flash_attn,
        },
        "cpu_backend": model.cpu_backend,
        "kernels": _core.kernels(),
        "llamacrab": __version__,
        "llama.cpp": _core.build_info(),
        "system_info": _core.system_info(),
    }


def _peak_rss() -> int | None:
    """Return the peak memory of this process in bytes, or None if the system does not say."""
    try:
        import resource
    except ImportError:  # no POSIX
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
