"""llamacrab over a plain C++ loop over the same llama.cpp at the best settings of a full sweep.

    python bench/loop.py [--rounds 7] [--quick]

Both tokenize, decode and normalise the same texts; loading is left out. The loop's settings are
searched over contexts x threads, tokens a pack and flash attention. llamacrab runs as it is tuned.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import tempfile
from pathlib import Path

from alternate import compare, seconds

from llamacrab import Llama, fetch_default_model, tuning
from llamacrab._core import build_info
from llamacrab._support.fetch import cache_dir
from llamacrab.bench.workloads import mixed, short

HERE = Path(__file__).resolve().parent
WORKLOADS = {"short": lambda: short(4000), "mixed": lambda: mixed(1000)}


class Loop:
    """A running `loop`, told to compute once by each call; a call returns its seconds.

    Called with a path, it writes the vectors there.
    """

    def __init__(self, program: Path, model: Path, texts: Path, *settings: int) -> None:
        command = [program, model, texts, *map(str, settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, vectors: Path | str = "go") -> float:
        self._process.stdin.write(f"{vectors}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def build(folder: Path) -> Path:
    """Compile loop.cpp against a llama.cpp that was built as llamacrab's own was."""
    said = f'OPTIONS "{build_info()["options"]}"'
    builds = [
        path
        for path in (cache_dir() / "builds").iterdir()
        if said in (path / "llamacrab_llama_build.h").read_text(encoding="utf-8")
    ]
    builds.sort(key=lambda path: path.stat().st_mtime)
    program = folder / "loop"
    archives = [builds[-1] / f"lib{name}.a" for name in ("llama", "ggml", "ggml-cpu", "ggml-base")]
    command = ["c++", "-O3", "-std=c++17", "-I", builds[-1] / "include", HERE / "loop.cpp"]
    subprocess.run([*command, "-o", program, *archives, "-lpthread", "-ldl"], check=True)
    return program


def sweep(program: Path, model: Path, texts: Path, quick: bool) -> tuple[int, ...]:
    """Return the best settings of the loop: all are tried once, the best few again and again.

    Only those few are tried without flash attention: it is slower for all but small packs.
    """
    cpus = tuning.usable_cpus()
    layouts = sorted({(cpus, 1), (1, cpus)}, reverse=True)
    packs = (128, 256) if quick else (64, 96, 128, 160, 192, 256, 320, 384, 512)
    taken: dict[tuple[int, ...], float] = {}

    def run(settings: tuple[int, ...], times: int) -> float:
        loop = Loop(program, model, texts, *settings)
        taken[settings] = min(loop() for _ in range(times))
        loop.close()
        print(f"    {settings}: {taken[settings]:.2f} s, the best of {times}", flush=True)
        return taken[settings]

    def best(n: int) -> list[tuple[int, ...]]:
        return sorted(taken, key=taken.__getitem__)[:n]

    for layout, pack in itertools.product(layouts, packs):
        run((*layout, pack, 1), 1)
    for settings in best(3):
        run((*settings[:3], 0), 1)
    return min(best(4), key=lambda settings: run(settings, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--quick", action="store_true", help="search less")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program, model = build(Path(folder)), fetch_default_model()
        for name in args.workload or WORKLOADS:
            texts = [text.replace("\n", " ") for text in WORKLOADS[name]()]
            path = Path(folder) / f"{name}.txt"
            path.write_text("\n".join(texts) + "\n", encoding="utf-8")
            settings = sweep(program, model, path, args.quick)
            loop = Loop(program, model, path, *settings)
            with Llama() as llama:
                runs = {
                    f"llamacrab {llama.layout}": lambda llama=llama, texts=texts: seconds(
                        lambda: llama.embed_texts(texts, truncate=True, dedup=False)
                    ),
                    f"C++ loop {settings}": loop,
                }
                compare(name, len(texts), runs, args.rounds)
            loop.close()


if __name__ == "__main__":
    main()
