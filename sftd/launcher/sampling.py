"""Samples of this host: CPU and memory by psutil, GPUs by NVML."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from sftd.domain.errors import Refused
from sftd.domain.log.events import GpuSample, SystemSampled
from sftd.launcher.inventory import nvml
from sftd.launcher.processes import host_name


class HostWatch:
    """Samples this host. The CPU load is the mean since the previous sample."""

    def __init__(self) -> None:
        self._before = _cpu_seconds()

    def look(self) -> Callable[[Sequence[str]], SystemSampled]:
        """Sample once. Returns a function from the names of an attempt's devices to the attempt's sample."""
        now = _cpu_seconds()
        busy, all_of_it = now[0] - self._before[0], now[1] - self._before[1]
        self._before = now
        percent = round(100 * min(1.0, max(0.0, busy / all_of_it)), 1) if all_of_it > 0 else 0.0
        memory = psutil.virtual_memory()
        gpus: dict[int, GpuSample] = {}

        def sample(devices: Sequence[str]) -> SystemSampled:
            names = [name for kind, _, name in (d.partition(":") for d in devices) if kind == "cuda"]
            # A part of a GPU has a name instead of a number.
            wanted = [int(name) for name in names if name.isdecimal()]
            if missing := [index for index in wanted if index not in gpus]:
                gpus.update(_gpus(missing))
            return SystemSampled(
                host=host_name(),
                cpu_percent=percent,
                memory_used_bytes=memory.total - memory.available,
                memory_total_bytes=memory.total,
                gpus=[gpus[index] for index in wanted if index in gpus],
            )

        return sample


def _cpu_seconds() -> tuple[float, float]:
    """(busy, all) seconds of all cores since the host started."""
    times = psutil.cpu_times()
    every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return every - times.idle - getattr(times, "iowait", 0.0), every


def _gpus(indexes: Sequence[int]) -> dict[int, GpuSample]:
    """NVML's samples of GPUs. Leaves out those with errors: these must not stop training."""
    found = {}
    with contextlib.suppress(Refused), nvml() as library:
        for index in indexes if library is not None else ():
            with contextlib.suppress(library.NVMLError):
                found[index] = _gpu(library, index)
    return found


def _gpu(library: Any, index: int) -> GpuSample:
    handle = library.nvmlDeviceGetHandleByIndex(index)

    def query(ask: Callable[[Any], Any]) -> Any:
        # Some drivers lack a value: MIG has no utilisation, a laptop no power.
        try:
            return ask(handle)
        except library.NVMLError:
            return None

    memory, rates = query(library.nvmlDeviceGetMemoryInfo), query(library.nvmlDeviceGetUtilizationRates)
    power = query(library.nvmlDeviceGetPowerUsage)
    return GpuSample(
        index=index,
        utilization_percent=float(rates.gpu) if rates is not None else None,
        memory_used_bytes=int(memory.used) if memory is not None else None,
        memory_total_bytes=int(memory.total) if memory is not None else None,
        power_watts=power / 1000 if power is not None else None,
    )
