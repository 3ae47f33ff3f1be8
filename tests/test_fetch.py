"""What is fetched is the pinned file, or one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import check_python

from llamacrab import errors, fetch_default_model
from llamacrab._support import fetch as _fetch
from llamacrab.models import default as default_model


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_pack.py", "x = 1\n")
        archive.writestr(
            "tiny_pack-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_pack-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_pack-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def fetch(wheel: Path, into: Path, sha256: str | None = None) -> Path:
    return _fetch.fetch("tiny-pack", "1.0", sha256 or _fetch.sha256_of(wheel), "wheel", into)


def test_a_file_is_fetched_once(index, tmp_path, monkeypatch):
    first = fetch(index, tmp_path / "cache")
    assert first.read_bytes() == index.read_bytes()
    sha256 = _fetch.sha256_of(index)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch(index, tmp_path / "cache", sha256) == first


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(index, tmp_path):
    with pytest.raises(_fetch.FetchError, match=r"has sha256 .* expected 0000"):
        fetch(index, tmp_path / "cache", "0000")
    assert list((tmp_path / "cache").iterdir()) == []
    assert fetch(index, tmp_path / "cache").is_file()


def test_a_half_written_file_is_fetched_again(index, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / index.name).write_bytes(index.read_bytes()[:50])
    assert fetch(index, cache).read_bytes() == index.read_bytes()


def test_what_is_not_there_is_one_line(index, tmp_path):
    with pytest.raises(_fetch.FetchError) as info:
        _fetch.fetch("no-such-pack", "1.0", "0000", "wheel", tmp_path / "cache")
    assert str(info.value).startswith("cannot fetch no-such-pack==1.0 (wheel) with pip: ERROR")
    assert "\n" not in str(info.value)


def test_processes_that_fetch_at_once_all_get_the_file(index, tmp_path):
    code = (
        "import sys; from pathlib import Path; from llamacrab._support import fetch\n"
        "print(fetch.fetch('tiny-pack', '1.0', sys.argv[1], 'wheel', Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, _fetch.sha256_of(index), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    results = {process.communicate(timeout=120)[0] for process in running}
    assert results == {f"{tmp_path / 'cache' / index.name}\n"}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [index.name]


def test_the_default_model_without_a_network_is_one_clear_line(index, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(errors.FetchError, match="`llamacrab fetch` gets it ahead of time") as info:
        fetch_default_model()
    assert "\n" not in str(info.value)
    assert isinstance(info.value, OSError)


def test_a_cache_that_cannot_be_made_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(errors.FetchError, match="cannot keep the default model"):
        fetch_default_model()


def test_processes_that_first_use_the_default_model_at_once_all_get_it(cache, tmp_path):
    # The download is shared, the conversion raced.
    (tmp_path / "downloads").symlink_to(cache / "downloads", target_is_directory=True)
    fetch_default_model()
    code = "from llamacrab import Llama; print(Llama().embed('a crab').shape)"
    env = {**os.environ, "LLAMACRAB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=env) for _ in range(3)]
    assert {process.communicate(timeout=280)[0] for process in running} == {b"(384,)\n"}
    models = [path.name for path in (tmp_path / "models").iterdir()]
    assert models == [default_model.default_model_path().name]


def test_no_torch_is_imported_for_the_default_model():
    check_python(
        "import sys; from llamacrab import Llama; Llama().embed('a crab'); "
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)"
    )


def test_the_caches_place_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMACRAB_CACHE", str(tmp_path))
    assert _fetch.cache_dir() == tmp_path
    monkeypatch.delenv("LLAMACRAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform.startswith("linux"):
        assert _fetch.cache_dir() == tmp_path / "xdg" / "llamacrab"
