"""What a daemon sees of its host."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from sftd.cli.app import make_home
from sftd.cli.daemon.command import run_daemon, start_detached
from sftd.cli.plan.target import Target
from sftd.domain.errors import Refused
from sftd.domain.spec.spec import Spec
from sftd.launcher import inventory, sampling
from sftd.launcher.sampling import HostWatch
from sftd.settings import read


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


def test_attempts_that_are_looked_at_together_have_their_own_gpus_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetHandleByIndex=int))
    sample = HostWatch().look()
    for names in (["cuda:1"], ["cuda:0", "cuda:2"], ["cuda:2"], ["cpu:0"]):
        wanted = [int(name[-1]) for name in names if name.startswith("cuda")]
        assert [gpu.index for gpu in sample(names).gpus] == wanted


def test_what_a_driver_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = nvml(nvmlDeviceGetUtilizationRates=refuse, nvmlDeviceGetPowerUsage=refuse)
    monkeypatch.setitem(sys.modules, "pynvml", silent)
    [gpu] = HostWatch().look()(["cuda:1"]).gpus
    assert (gpu.utilization_percent, gpu.power_watts, gpu.memory_used_bytes) == (None, None, 3)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=refuse))
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
        Target.find(Spec())
    assert Target.find(Spec(), gib=128).memory == 128 * 2**30


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        # As CUDA has it: what follows one that is missing does not count.
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


def test_a_driver_that_cannot_be_asked_is_not_a_host_without_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The daemon, `plan` and `verify` go by it: taken for 0 GPUs, runs would train on CPUs without a word."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=refuse))
    monkeypatch.setattr(inventory, "_DRIVER", tmp_path / "version")
    assert inventory.visible_gpus({}) == []
    assert inventory.gpus() == []
    (tmp_path / "version").touch()
    for ask in (lambda: inventory.visible_gpus({}), inventory.gpus, inventory.gpu_count):
        with pytest.raises(Refused, match="NVIDIA driver, but NVML") as refused:
            ask()
        assert "CUDA_VISIBLE_DEVICES= sftd daemon" in refused.value.problems[0].fix
    # Told to do without GPUs, the daemon does not ask.
    for said in ("", " ", "-1"):
        assert inventory.visible_gpus({"CUDA_VISIBLE_DEVICES": said}) == []
    # What a sample lacks stops no training.
    assert HostWatch().look()(["cuda:1"]).gpus == []


def test_the_daemon_refuses_to_start_where_gpus_cannot_be_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=refuse))
    monkeypatch.setattr(inventory, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = read({"SFTD_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": ""})
    make_home(settings)
    for start in (lambda: run_daemon(settings, drain=True), lambda: start_detached(settings)):
        with pytest.raises(Refused, match="NVIDIA driver"):
            start()
