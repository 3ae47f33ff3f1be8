"""Fixtures: models that are loaded once, and a cache that does not remember what tests measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before numpy is imported. Threads of its BLAS spin while they wait for each other, which small
# matrices are not worth; processes that tests start inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from helpers import gguf_path

from llamacrab import Llama, PoolingType
from llamacrab._support import fetch as _fetch

# Some tests compute with all CPUs, and each process loads its own models.
MOST_PROCESSES = 4


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes run the tests."""
    return min(
        MOST_PROCESSES,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Use a cache of our own, with the downloads and models of the user's."""
    users = _fetch.cache_dir()
    ours = tmp_path_factory.mktemp("cache")
    for folder in ("downloads", "models"):
        (users / folder).mkdir(parents=True, exist_ok=True)
        (ours / folder).symlink_to(users / folder, target_is_directory=True)
    # Subprocesses must see it too. It stays set: nothing runs after the last test.
    os.environ["LLAMACRAB_CACHE"] = str(ours)
    return ours


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the root of the clone: a process started there would import the uncompiled source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture(scope="session")
def load(cache: Path) -> Iterator[Callable[..., Llama]]:
    """Return a function that gives the `Llama` of a tiny model, the same one to every test."""
    made: dict[tuple[str, PoolingType], Llama] = {}

    def load(name: str, pooling_type: PoolingType = PoolingType.UNSPECIFIED) -> Llama:
        if (name, pooling_type) not in made:
            made[name, pooling_type] = Llama(gguf_path(name), pooling_type=pooling_type)
        return made[name, pooling_type]

    yield load
    for llama in made.values():
        llama.close()


@pytest.fixture(scope="session")
def minilm(cache: Path) -> Iterator[Llama]:
    """Give the default model."""
    with Llama() as llama:
        yield llama
