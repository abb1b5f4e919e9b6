"""CPU cores that may be used: what the affinity leaves, and what a container's quota leaves of that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sftd.wire.cores import usable_cores


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/\n"}
NESTED = {"proc/self/cgroup": "0::/user.slice/job\n"}
V1 = {"proc/self/cgroup": "4:cpu,cpuacct:/docker/a\n1:name=systemd:/\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        (V2 | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        (V2 | {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3),
        # Less than a core is one all the same.
        (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # More than the affinity leaves.
        (V2 | {"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 64),
        # The tightest of a group and those above it.
        (
            NESTED
            | {
                "sys/fs/cgroup/user.slice/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n",
            },
            4,
        ),
        (
            V1
            | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            64,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
    ],
)
def test_a_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cores(host(tmp_path, files)) == cores


def test_this_machine_has_at_least_one_and_no_more_than_the_affinity() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_other_controllers_decide_nothing_wherever_they_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    files = {
        "proc/self/cgroup": "9:memory:/a\n8:cpuset:/a\n4:cpu,cpuacct:/a\n0::/b\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "600000",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/b/cpu.max": "500000 100000",
        "sys/fs/cgroup/memory/a/cpu.max": "100000 100000",
    }
    assert usable_cores(host(tmp_path, files)) == 5
    # The group above the mount is another's.
    files["sys/fs/cpu.max"] = "100000 100000"
    assert usable_cores(host(tmp_path, files)) == 5
    files["sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "200000"
    files["sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000"
    assert usable_cores(host(tmp_path, files)) == 2
