"""The number of CPU cores that this process may use: the smaller of its affinity and its container's quota."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least 1. `root` is the folder of `proc` and `sys`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """CPU quotas, in cores, of this process's control group and its ancestors."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # In a cgroup namespace, the container's group is the root of the mount.
        folder = mount / group.lstrip("/")
        for each in (folder, *folder.parents):
            found += _quota(each)
            if each == mount:
                break
    return found


def _quota(group: Path) -> list[float]:
    """One group's quota in cores; empty without a limit. cgroup v2 has `QUOTA PERIOD` in one file, v1 two files, all in µs."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(quota) / int(period)
    except (OSError, ValueError):
        return []
    return [cores] if cores > 0 else []
