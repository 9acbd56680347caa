"""What the process may use: control groups of both versions on a fake disk, limits, affinity."""

import os
import resource

import pytest

from nanovllm_jax.engine import host

MIB = 1 << 20
V1 = "30 20 0:26 {top} /sys/fs/cgroup/{name} rw,nosuid shared:9 - cgroup cgroup rw,{name}\n"
V2 = "31 20 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
DISK = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"


@pytest.fixture
def root(tmp_path):
    """A function that writes files of a system's root: root({path: text}) -> the root."""

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, "utf-8")
        return tmp_path

    return write


@pytest.fixture
def machine(monkeypatch):
    """A machine of 24 GiB and 64 processors."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 1024 * MIB // 4096}
    monkeypatch.setattr(host.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)


def v2(group, **files):
    described = {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": DISK + V2}
    return described | {f"sys/fs/cgroup/{path}": text for path, text in files.items()}


def v1(group, top, name, files):
    return {
        "proc/self/cgroup": f"9:cpuset:/\n4:{name},other:{group}\n0::/\n",
        "proc/self/mountinfo": DISK + V1.format(top=top, name=name),
    } | {f"sys/fs/cgroup/{name}/{path}": text for path, text in files.items()}


NONE_V1 = "9223372036854771712\n"  # v1's word for no limit


@pytest.mark.parametrize(
    ("files", "mib"),
    [
        ({}, 24 * 1024),
        (v2("/", **{"memory.max": f"{1000 * MIB}\n"}), 1000),
        (v2("/a/b", **{"a/b/memory.max": "max\n", "a/memory.max": f"{700 * MIB}\n"}), 700),
        (v2("/a", **{"a/memory.max": f"{900 * MIB}\n", "a/memory.high": f"{800 * MIB}\n"}), 800),
        (v2("/a", **{"a/memory.max": "max\n"}), 24 * 1024),
        (v2("/a", **{"b/memory.max": f"{MIB}\n"}), 24 * 1024),  # another group's
        (v2("/../other", **{"memory.max": f"{600 * MIB}\n"}), 600),
        (v1("/", "/", "memory", {"memory.limit_in_bytes": NONE_V1}), 24 * 1024),
        (v1("/a/b", "/", "memory", {"a/b/memory.limit_in_bytes": f"{500 * MIB}"}), 500),
        # In a container whose host's groups are named, but whose own is mounted as the root.
        (v1("/docker/7", "/docker/7", "memory", {"memory.limit_in_bytes": f"{400 * MIB}"}), 400),
        (v1("/docker/7", "/", "memory", {"memory.limit_in_bytes": f"{400 * MIB}"}), 400),
    ],
)
def test_the_smallest_memory_limit_on_the_way_to_the_root_counts(root, machine, files, mib):
    assert host.memory_bytes(root(files)) == mib * MIB


def test_resource_limits_count_too(root, machine, monkeypatch):
    limits = {resource.RLIMIT_AS: (3000 * MIB, resource.RLIM_INFINITY)}
    none = (resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, none))
    assert host.memory_bytes(root({})) == 3000 * MIB


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        (v2("/a", **{"a/cpu.max": "200000 100000\n"}), 2),
        (v2("/a", **{"a/cpu.max": "150000 100000\n"}), 2),
        (v2("/a", **{"a/cpu.max": "5000 100000\n"}), 1),
        (v2("/a", **{"a/cpu.max": "max 100000\n", "cpu.max": "300000 100000"}), 3),
        (v1("/a", "/", "cpu", {"a/cpu.cfs_quota_us": "-1", "a/cpu.cfs_period_us": "100000"}), 64),
        (v1("/a", "/", "cpu", {"a/cpu.cfs_quota_us": "400000", "a/cpu.cfs_period_us": "1000"}), 64),
        (v1("/a", "/", "cpu", {"a/cpu.cfs_quota_us": "4000", "a/cpu.cfs_period_us": "1000"}), 4),
    ],
)
def test_a_quota_limits_the_processors(root, machine, files, cpus):
    assert host.num_cpus(root(files)) == cpus


def test_affinity_limits_the_processors(root):
    assert host.num_cpus(root({})) == len(os.sched_getaffinity(0))


def test_this_machine_can_be_read():
    assert host.memory_bytes() > 0 and 0 < host.num_cpus() <= (os.cpu_count() or 1)
