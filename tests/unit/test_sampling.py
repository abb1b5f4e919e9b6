"""What a daemon sees of its host."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from sftd.cli.plan import Host
from sftd.domain.errors import Refused
from sftd.domain.spec import Spec
from sftd.launcher import inventory, sampling
from sftd.launcher.sampling import HostWatch


class NvmlError(Exception):
    pass


def nvml(**changes: Any) -> ModuleType:
    """NVML's functions as on a host with one GPU, number 1."""

    def handle(index: int) -> int:
        if index != 1:
            raise NvmlError
        return index

    module = ModuleType("pynvml")
    told = {
        "NVMLError": NvmlError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=3, total=4),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=97),
        "nvmlDeviceGetPowerUsage": lambda _: 612_500,
    }
    vars(module).update(told | changes)
    return module


def refuse(*_: object) -> None:
    raise NvmlError


def test_the_host_is_told_with_its_cpu_and_memory() -> None:
    sample = HostWatch().look()(["cpu:0"])
    assert 0 <= sample.cpu_percent <= 100
    assert 0 < sample.memory_used_bytes < sample.memory_total_bytes == psutil.virtual_memory().total
    assert sample.gpus == []


def test_cpu_is_the_mean_since_the_look_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(10.0, 100.0), (13.0, 104.0), (13.0, 108.0), (13.0, 108.0)])
    monkeypatch.setattr(sampling, "_cpu_seconds", lambda: next(seconds))
    watch = HostWatch()
    assert [watch.look()([]).cpu_percent for _ in range(3)] == [75.0, 0.0, 0.0]


def test_only_the_gpus_of_the_attempt_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    [gpu] = HostWatch().look()(["cuda:1", "cuda:2"]).gpus
    assert (gpu.index, gpu.utilization_percent, gpu.power_watts) == (1, 97.0, 612.5)
    assert (gpu.memory_used_bytes, gpu.memory_total_bytes) == (3, 4)


def test_what_a_driver_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = nvml(nvmlDeviceGetUtilizationRates=refuse, nvmlDeviceGetPowerUsage=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", silent)
    [gpu] = HostWatch().look()(["cuda:1"]).gpus
    assert (gpu.utilization_percent, gpu.power_watts, gpu.memory_used_bytes) == (None, None, 3)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=refuse))
    assert HostWatch().look()(["cuda:1"]).gpus == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert HostWatch().look()(["cuda:1"]).gpus == []


def test_a_gpu_that_does_not_tell_its_memory_is_listed_and_the_plan_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that shares the host's memory. `sftd submit` asks for it, and must not fail for a line of advice."""
    found = nvml(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda _: "NVIDIA GB10",
        nvmlDeviceGetMemoryInfo=refuse,
    )
    monkeypatch.setitem(sys.modules, "pynvml", found)
    assert inventory.gpus() == [("NVIDIA GB10", 0)]
    with pytest.raises(Refused, match="NVIDIA GB10"):
        Host.find(Spec())
    assert Host.find(Spec(), gib=128).memory == 128 * 2**30


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        # As CUDA has it: what stands behind one that is not there does not count.
        (" 1 , 7, 0", ["1"]),
        ("1,1", ["1"]),
        ("", []),
        ("-1", []),
        ("GPU-1b", ["1"]),
        ("GPU-1,GPU-2", []),
        ("MIG-5f", ["MIG-5f"]),
    ],
)
def test_the_daemon_uses_only_the_gpus_that_it_may_see(
    monkeypatch: pytest.MonkeyPatch, said: str | None, names: list[str]
) -> None:
    uuids = ["GPU-0a", "GPU-1b", "GPU-1a"]
    found = nvml(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=uuids.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", found)
    environ = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    assert inventory.visible_gpus(environ) == names
    mine = inventory.Inventory(names, 4)
    assert mine.gpus == [f"cuda:{name}" for name in names]
    assert mine.describe()["gpus"] == len(names)


def test_a_part_of_a_gpu_has_no_sample_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert [gpu.index for gpu in HostWatch().look()(["cuda:MIG-5f", "cuda:1"]).gpus] == [1]
