"""The build fetches the pinned source or says why not, and is made once for each set of options."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from llamacrab import _core
from llamacrab._support import versions as _versions

ROOT = Path(__file__).resolve().parent.parent
SUBPROJECT = Path("subprojects") / "llama.cpp"

# What pip runs to learn the name of an sdist that it downloads.
BACKEND = """
def prepare_metadata_for_build_wheel(folder, settings=None):
    import os, pathlib
    pathlib.Path(os.environ["PIP_FIND_LINKS"], "ran").touch()
    info = pathlib.Path(folder, "fake_llama-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: fake-llama\\nVersion: 1.0\\n")
    return info.name

def build_wheel(folder, settings=None, metadata=None):
    raise NotImplementedError
"""
SDIST = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: fake-llama\nVersion: 1.0\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n',
    "b.py": BACKEND,
    "src/ours.cpp": "of the package around it",
    "vendor/llama.cpp/CMakeLists.txt": "project(fake)",
    "vendor/llama.cpp/LICENSE": "MIT",
    "vendor/llama.cpp/.git/config": "not needed",
    "vendor/llama.cpp/cmake/x.cmake": "",
    "vendor/llama.cpp/ggml/include/ggml.h": "",
    "vendor/llama.cpp/include/llama.h": "// the header",
    "vendor/llama.cpp/models/vocab.gguf": "not needed",
    "vendor/llama.cpp/src/llama.cpp": "",
    "vendor/llama.cpp/tools/main.cpp": "not needed",
    "vendor/llama.cpp/vendor/v.h": "",
}
NEEDED = {
    *("CMakeLists.txt", "LICENSE", "cmake/x.cmake", "ggml/include/ggml.h", "include/llama.h"),
    *("src/llama.cpp", "vendor/v.h", ".sha256"),
}


class Clone:
    """The scripts that fetch and build, in a clone of their own, with a small fake of llama.cpp."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts = folder / "clone" / SUBPROJECT
        self.scripts.mkdir(parents=True)
        for name in ("fetch.py", "build.py"):
            shutil.copy(ROOT / SUBPROJECT / name, self.scripts)
        support = folder / "clone" / "llamacrab" / "_support"
        support.mkdir(parents=True)
        shutil.copy(ROOT / "llamacrab" / "_support" / "fetch.py", support)
        self.index = folder / "index"
        self.index.mkdir()
        self.sdist = self.index / "fake_llama-1.0.tar.gz"
        with tarfile.open(self.sdist, "w:gz") as archive:
            for name, text in SDIST.items():
                member = tarfile.TarInfo(f"fake_llama-1.0/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        self.cache = folder / "cache"
        self.tree = folder / "tree"
        self.environment = {
            **os.environ,
            "LLAMACRAB_CACHE": str(self.cache),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
        }
        self.pin(hashlib.sha256(self.sdist.read_bytes()).hexdigest())

    def pin(self, sha256: str) -> None:
        pin = json.loads((ROOT / SUBPROJECT / "pin.json").read_text(encoding="utf-8"))
        pin |= {"name": "fake-llama", "version": "1.0", "sha256": sha256}
        (self.scripts / "pin.json").write_text(json.dumps(pin))

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(self.scripts / script), *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def fetch(self) -> None:
        done = self.run("fetch.py", self.tree)
        assert (done.returncode, done.stdout) == (0, f"{self.tree}\n"), done.stderr

    def files(self) -> set[str]:
        found = (path for path in self.tree.rglob("*") if path.is_file())
        return {path.relative_to(self.tree).as_posix() for path in found}

    def fake_cmake(self) -> None:
        """Put a `cmake` on PATH that makes an archive, and keeps count of its builds."""
        programs = self.folder / "programs"
        programs.mkdir()
        cmake = programs / "cmake"
        cmake.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            "if '--build' in sys.argv:\n"
            "    binary = pathlib.Path(sys.argv[2])\n"
            "    binary.mkdir(parents=True, exist_ok=True)\n"
            "    (binary / 'libllama.a').write_text('an archive')\n"
            f"    with open({str(self.folder / 'builds')!r}, 'a') as count:\n"
            "        count.write('x')\n"
        )
        cmake.chmod(cmake.stat().st_mode | stat.S_IXUSR)
        self.environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def build(self, out: str, *arguments: str) -> Path:
        folder = self.folder / out
        done = self.run(
            *("build.py", "--out", folder, "--scratch", self.folder / f"{out}.p"),
            *("--native", "ON", "--openmp", "OFF", *arguments),
        )
        assert done.returncode == 0, done.stderr
        assert (folder / "libllama.a").read_text() == "an archive"
        assert (folder / "include" / "llama.h").read_text() == "// the header"
        assert (folder / "LICENSE.llama.cpp").read_text() == "MIT"
        return folder

    def n_builds(self) -> int:
        return len((self.folder / "builds").read_text())


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.fixture
def builder(monkeypatch) -> ModuleType:
    """Import build.py of this repository."""
    monkeypatch.syspath_prepend(str(ROOT / SUBPROJECT))
    spec = importlib.util.spec_from_file_location("llama_build", ROOT / SUBPROJECT / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_part_that_a_build_reads_is_unpacked(clone):
    clone.fetch()
    assert clone.files() == NEEDED


def test_what_is_there_is_not_fetched_again(clone):
    clone.fetch()
    clone.sdist.unlink()
    clone.fetch()
    shutil.rmtree(clone.tree)
    clone.fetch()  # from the cache
    assert clone.files() == NEEDED


def test_a_wrong_hash_is_one_line_and_does_not_poison_the_next_fetch(clone):
    good = hashlib.sha256(clone.sdist.read_bytes()).hexdigest()
    clone.pin("0" * 64)
    done = clone.run("fetch.py", clone.tree)
    assert done.returncode == 1
    assert done.stderr == (
        f"llama.cpp: fake-llama==1.0 (sdist) has sha256 {good}, expected {'0' * 64}: not used\n"
    )
    assert not clone.tree.exists()
    assert list(clone.cache.rglob("*.tar.gz")) == []
    clone.pin(good)
    clone.fetch()
    assert clone.files() == NEEDED


def test_nothing_of_an_sdist_runs_before_its_hash_is_checked(clone):
    clone.pin("0" * 64)
    assert clone.run("fetch.py", clone.tree).returncode == 1
    assert not (clone.index / "ran").exists()


def test_a_half_finished_download_is_replaced(clone):
    (clone.cache / "downloads").mkdir(parents=True)
    half = clone.cache / "downloads" / clone.sdist.name
    half.write_bytes(clone.sdist.read_bytes()[:100])
    clone.fetch()
    assert half.read_bytes() == clone.sdist.read_bytes()


def test_no_network_is_one_line(clone):
    clone.sdist.unlink()
    done = clone.run("fetch.py", clone.tree)
    assert done.returncode == 1
    assert done.stderr.startswith("llama.cpp: cannot fetch fake-llama==1.0 (sdist) with pip: ")
    assert done.stderr.count("\n") == 1
    assert not clone.tree.exists()


def test_a_half_unpacked_tree_is_replaced(clone):
    (clone.tree / "src").mkdir(parents=True)
    (clone.tree / "src" / "half.cpp").write_text("")
    clone.fetch()
    assert clone.files() == NEEDED


def test_a_tree_of_another_pin_is_replaced(clone):
    clone.tree.mkdir()
    (clone.tree / ".sha256").write_text("of another version")
    clone.fetch()
    assert clone.files() == NEEDED


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no filter")
def test_an_archive_that_reaches_out_of_its_folder_is_refused(clone):
    with tarfile.open(clone.sdist, "w:gz") as archive:
        for name, text in {**SDIST, "vendor/llama.cpp/src/../../out": "x"}.items():
            member = tarfile.TarInfo(f"fake_llama-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    clone.pin(hashlib.sha256(clone.sdist.read_bytes()).hexdigest())
    clone.run("fetch.py", clone.tree)
    assert not clone.tree.exists()
    assert not (clone.folder / "out").exists()


def test_the_same_build_is_made_once(clone):
    clone.fake_cmake()
    clone.build("first")
    clone.build("second")
    assert clone.n_builds() == 1
    clone.build("third", "--cmake-arg=-DGGML_CUDA_FA=OFF")
    assert clone.n_builds() == 2


def test_a_half_made_build_is_not_taken(clone):
    clone.fake_cmake()
    clone.build("first")
    (kept,) = (clone.cache / "builds").iterdir()
    # What a build that was killed leaves behind.
    kept.rename(kept.with_name(".new-killed"))
    clone.build("second")
    assert clone.n_builds() == 2


def test_a_cache_that_cannot_be_made_costs_the_cache_and_not_the_build(clone):
    clone.fake_cmake()
    clone.cache.write_text("a file where the folder should be")
    clone.build("first")
    clone.build("first")
    assert clone.n_builds() == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder closed even to root")
def test_a_cache_that_cannot_be_written_costs_the_cache_and_not_the_build(clone):
    clone.fake_cmake()
    clone.cache.mkdir()
    for folder in ("builds", "downloads"):
        (clone.cache / folder).symlink_to("/proc", target_is_directory=True)
    clone.build("first")
    clone.build("first")
    assert clone.n_builds() == 1


def test_a_source_that_cannot_be_had_is_one_line_of_the_build(clone):
    clone.sdist.unlink()
    done = clone.run(
        *("build.py", "--out", clone.folder, "--scratch", clone.folder / "p"),
        *("--native", "ON", "--openmp", "OFF"),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("llama.cpp: cannot fetch fake-llama==1.0")
    assert done.stderr.count("\n") == 1


def options(builder: ModuleType, native: str = "ON", backend: tuple[str, ...] = ()):
    arguments = builder.argparse.Namespace(
        native=native, portable=False, openmp="OFF", backend=list(backend)
    )
    return builder.cmake_options(arguments)


def test_the_cpu_is_chosen_by_the_option_and_not_by_source_date_epoch(builder, monkeypatch):
    # Left alone, ggml turns GGML_NATIVE off under SOURCE_DATE_EPOCH, and AVX with it.
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert options(builder)["GGML_NATIVE"] == "ON"
    travels = options(builder, "OFF")
    assert (travels["GGML_NATIVE"], travels["GGML_AVX2"]) == ("OFF", "ON")


def test_every_backend_is_said_to_be_on_or_off(builder):
    said = options(builder, backend=("vulkan",))
    backends = ("BLAS", "CUDA", "METAL", "VULKAN")
    assert {name: said[f"GGML_{name}"] for name in backends} == {
        **dict.fromkeys(backends, "OFF"),
        "VULKAN": "ON",
    }


def test_what_is_said_of_the_options_is_what_holds(builder):
    extra = ["-DGGML_NATIVE:BOOL=OFF", "-DCMAKE_CXX_FLAGS=-O2 -g", "-Wno-dev", "-DGGML_CUDA_FA=OFF"]
    said = builder.said(options(builder), extra)
    assert {"GGML_NATIVE=OFF", "CMAKE_CXX_FLAGS=-O2_-g", "GGML_CUDA_FA=OFF"} <= set(said)
    assert "GGML_NATIVE=ON" not in said
    assert all("=" in one and " " not in one for one in said)


@pytest.mark.parametrize("variable", ["CC", "CXX", "CFLAGS", "CXXFLAGS", "SOURCE_DATE_EPOCH"])
def test_a_build_is_kept_for_its_options_and_compiler_only(builder, monkeypatch, variable):
    monkeypatch.delenv(variable, raising=False)
    plain = builder.cache_key(options(builder), [])
    assert builder.cache_key(options(builder), []) == plain
    assert builder.cache_key(options(builder, "OFF"), []) != plain
    assert builder.cache_key(options(builder), ["-DGGML_AVX2=OFF"]) != plain
    monkeypatch.setenv(variable, "c++" if variable.startswith("C") else "1")
    assert builder.cache_key(options(builder), []) != plain


@pytest.mark.parametrize("found", ["0.4.9", "0.6.0", "1.5.0"])
def test_a_libllama_of_another_version_is_refused_at_import(monkeypatch, found):
    info = {**_core.build_info(), "built_for": "0.5.0", "version": found}
    monkeypatch.setattr(_core, "build_info", lambda: info)
    with pytest.raises(ImportError, match=rf"compiled for llama.cpp 0.5.0.* now {found}"):
        _versions.check_abi()


@pytest.mark.parametrize("found", ["0.5.0", "0.5.0-dev"])
def test_a_libllama_of_the_same_version_is_taken(monkeypatch, found):
    info = {**_core.build_info(), "built_for": "0.5.0", "version": found}
    monkeypatch.setattr(_core, "build_info", lambda: info)
    _versions.check_abi()
