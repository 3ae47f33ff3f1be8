"""What the process may use of the machine: limits of cgroups, in trees made for the test."""

from __future__ import annotations

import os

import pytest

from llamacrab import tuning
from llamacrab._support import hardware

MIB = 1 << 20


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(root)


V1 = {"proc/self/cgroup": "4:memory:/a/b\n2:cpu,cpuacct:/a/b\n0::/\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
CPU_V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "300000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        (
            V2
            | {
                "sys/fs/cgroup/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            2,
        ),
        (V2 | {"sys/fs/cgroup/other/cpu.max": "100000 100000\n"}, None),
        # What a container sees as the root is its own.
        (V2 | {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            V1
            | {
                f"{CPU_V1}/a/b/cpu.cfs_quota_us": "-1\n",
                f"{CPU_V1}/a/b/cpu.cfs_period_us": "100000\n",
                f"{CPU_V1}/a/cpu.cfs_quota_us": "250000\n",
                f"{CPU_V1}/a/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (V1 | {"sys/fs/cgroup/unified/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "no cgroup\n", "sys/fs/cgroup/cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_quotas_of_the_cgroup_and_of_those_above_it_are_respected(tmp_path, files, cpus):
    root = tree(tmp_path, files)
    assert hardware.cgroup_cpus(root) == cpus
    assert hardware.usable_cpus(root) == min(hardware.usable_cpus(), cpus or 1 << 20)


@pytest.mark.parametrize(
    ("files", "mib"),
    [
        ({}, 8000),
        (
            V2
            | {
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": f"{100 * MIB}\n",
                "sys/fs/cgroup/a/memory.max": f"{1000 * MIB}\n",
                "sys/fs/cgroup/a/memory.current": f"{700 * MIB}\n",
                "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {200 * MIB}\n",
            },
            500,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": f"{1000 * MIB}\n",
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": f"{900 * MIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5000 * MIB}\n",
            },
            100,
        ),
        (
            V2
            | {
                "sys/fs/cgroup/a/b/memory.max": f"{10 * MIB}\n",
                "sys/fs/cgroup/a/b/memory.current": f"{20 * MIB}\n",
            },
            0,
        ),
    ],
)
def test_memory_is_what_the_system_and_every_cgroup_leave(tmp_path, files, mib):
    meminfo = {"proc/meminfo": f"MemFree: 5 kB\nMemAvailable:   {8000 * 1024} kB\n"}
    assert hardware.available_memory(tree(tmp_path, meminfo | files)) == mib * MIB


def test_where_nothing_tells_of_memory_there_is_no_limit(tmp_path):
    assert hardware.available_memory(str(tmp_path)) is None


def test_this_machine_says_what_it_has():
    assert 1 <= hardware.usable_cpus() <= (os.cpu_count() or 1)
    assert tuning.usable_cpus is hardware.usable_cpus
    assert tuning.has_gpu is hardware.has_gpu


def test_features_of_a_cpu_are_those_that_matter(tmp_path):
    root = tree(tmp_path, {"proc/cpuinfo": "processor: 0\nflags\t: fpu avx2 sse avx512f\n"})
    assert hardware.cpu_features(root) == ["avx2", "avx512f"]
    assert hardware.cpu_features(str(tmp_path / "no")) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_is_respected():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert hardware.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
