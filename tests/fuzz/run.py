"""Throw hostile inputs, or mutated GGUF files, at llamacrab, and say what ends or stops a process.

    python tests/fuzz/run.py inputs --count 1000000
    python tests/fuzz/run.py ggufs --count 100000
    python tests/fuzz/run.py ggufs --only 1234

Case i of a seed is always the same. Cases run in worker processes; this one watches them. It
records a worker that dies, one that is stuck in a case, and an exception of a type that a caller
would not expect, goes on with the next case, and ends with 1 if there was any. `--only` runs one
case in this process: to be debugged.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS_A_CASE = 60
CASES_A_WORKER = {"inputs": 20_000, "ggufs": 500}
MEMORY = 6 << 30  # bytes a worker may map: huge sizes must fail, not fill the machine
# What the two write to each other: the case at work, cases that were answered, cases refused.
PROGRESS = struct.Struct("<qqq")


def supervise(kind: str, seed: int, first: int, count: int, seconds: float) -> list[dict]:
    """Run the cases from `first` on, and return those that went wrong."""
    faults: list[dict] = []
    answered = refused = 0
    began, said, at, stop = time.monotonic(), 0.0, first, first + count
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "progress").open("w+b") as file:
        file.write(bytes(PROGRESS.size))
        file.flush()
        progress = mmap.mmap(file.fileno(), PROGRESS.size)
        while at < stop:
            n = min(CASES_A_WORKER[kind], stop - at)
            progress[:] = PROGRESS.pack(-1, 0, 0)
            status, output = watch(kind, seed, at, n, file.name, progress, seconds)
            case, done, not_done = PROGRESS.unpack(progress)
            if case < 0:
                sys.exit(f"a worker did not even start ({status}): {output}")
            answered += done
            refused += not_done
            new = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            if status:
                lines = output.splitlines()
                last_words = " | ".join(lines[:4] + lines[4:][-8:])[:2000]
                new.append({"case": case, "what": status, "output": last_words})
            for fault in new:
                print(json.dumps(fault), flush=True)
            faults += new
            at = case + 1 if status else at + n
            if at >= stop or time.monotonic() - said > 60:
                said = time.monotonic()
                print(
                    f"{kind}: {at - first} of {count} in {said - began:.0f} s: {answered} "
                    f"answered, {refused} refused, {len(faults)} faults",
                    flush=True,
                )
    return faults


def watch(
    kind: str, seed: int, first: int, count: int, path: str, progress: mmap.mmap, seconds: float
) -> tuple[str, str]:
    """Run a worker to its end, or until it is stuck; return how it failed, and what it said."""
    command = [sys.executable, __file__, kind, "--seed", seed, "--first", first, "--count", count]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        worker = subprocess.Popen(
            [*map(str, command), "--worker", path],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONFAULTHANDLER": "1"},
        )
        status, seen, since = "", b"", time.monotonic()
        while worker.poll() is None:
            time.sleep(0.05)
            if progress[:] != seen:
                seen, since = progress[:], time.monotonic()
            elif time.monotonic() - since > seconds:
                status = f"stuck for {seconds} s"
                worker.kill()
                worker.wait()
        if not status and worker.returncode:
            status = f"exit code {worker.returncode}"
        output.seek(0)
        return status, output.read()


def work(kind: str, seed: int, first: int, count: int, path: str | None) -> None:
    """Run cases in this process."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import hostile_inputs
    import mutated_ggufs

    os.environ["LLAMACRAB_CACHE"] = str(Path(tempfile.gettempdir()) / "llamacrab-fuzz-cache")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = hostile_inputs if kind == "inputs" else mutated_ggufs
    counts = [0, 0]
    progress = None
    if path:
        with Path(path).open("r+b") as file:
            progress = mmap.mmap(file.fileno(), PROGRESS.size)
    with module.target() as target:
        for case in range(first, first + count):
            if progress:
                progress[:] = PROGRESS.pack(case, *counts)
            try:
                module.run(target, random.Random(f"{kind} {seed} {case}"))
            except module.EXPECTED as error:
                counts[1] += 1
                if not path:
                    print(f"{type(error).__name__}: {error}")
            except Exception as error:
                if not path:
                    raise
                what = f"{type(error).__name__}: {error}"[:500]
                print(json.dumps({"case": case, "what": what}), flush=True)
            else:
                counts[0] += 1
        if progress:
            progress[:] = PROGRESS.pack(first + count, *counts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=("inputs", "ggufs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS_A_CASE, help="that a case may take"
    )
    parser.add_argument("--only", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        work(args.kind, args.seed, args.only, 1, None)
        return 0
    if args.worker:
        work(args.kind, args.seed, args.first, args.count, args.worker)
        return 0
    return bool(supervise(args.kind, args.seed, args.first, args.count, args.seconds))


if __name__ == "__main__":
    sys.exit(main())
