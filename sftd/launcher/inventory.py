"""Devices of this host (GPUs if it has any, else CPU cores) and places of other launchers. Never oversubscribed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftd.domain.errors import Problem, Refused
from sftd.domain.queue.demand import Demand, Need, need
from sftd.domain.spec.spec import Spec

__all__ = ["Inventory", "Need", "gpu_count", "gpus", "nvml", "visible_gpus"]


_DRIVER = Path("/proc/driver/nvidia/version")
_FIX = (
    "make `nvidia-smi` work here (load the driver, or give the container its GPUs); to train on CPU cores instead, "
    "set CUDA_VISIBLE_DEVICES to nothing: `CUDA_VISIBLE_DEVICES= sftd daemon`"
)


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """The initialised module pynvml; None without an NVIDIA driver. Raises `Refused` if there is a driver but NVML does not list
    its GPUs: the daemon would otherwise train on CPUs without notice."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if _DRIVER.exists():
            raise Refused(Problem("devices", _silent(error), _FIX)) from None
        yield None
        return
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise Refused(Problem("devices", _silent(error), _FIX)) from None
    finally:
        pynvml.nvmlShutdown()


def _silent(error: Exception) -> str:
    return f"there is an NVIDIA driver, but NVML does not list its GPUs: {error}"


def gpu_count() -> int:
    """GPUs that NVML lists; 0 without a driver. Raises `Refused` as `nvml` does."""
    with nvml() as library:
        return int(library.nvmlDeviceGetCount()) if library is not None else 0


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that runs may use, in the notation of CUDA_VISIBLE_DEVICES: all that NVML lists, or those that the variable
    names, in its order. A part of a GPU (MIG) keeps its own name. Raises `Refused` as `nvml` does, unless the variable is
    empty."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is not None and value.strip() in ("", "-1"):
        return []
    count = gpu_count()
    if value is None or not count:
        return [str(index) for index in range(count)]
    found: list[str] = []
    for given in map(str.strip, value.split(",")):
        name = given if given.isdecimal() or given.startswith("MIG-") else _index_of(given, count)
        # CUDA ignores everything after the first invalid name.
        if not name or (name.isdecimal() and int(name) >= count):
            break
        if name not in found:
            found.append(name)
    return found


def _index_of(uuid: str, count: int) -> str:
    """Number of the one GPU whose UUID begins with `uuid`; empty if there is not exactly one."""
    if not uuid.startswith("GPU-"):
        return ""
    with nvml() as library:
        uuids = [str(library.nvmlDeviceGetUUID(library.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
    found = [index for index, name in enumerate(uuids) if name.startswith(uuid)]
    return str(found[0]) if len(found) == 1 else ""


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of each GPU that NVML lists; none without a driver. 0 bytes if the driver does not report them
    (a GPU that shares the host's memory, a slice of a GPU). Raises `Refused` as `nvml` does."""
    with nvml() as library:
        if library is None:
            return []

        def memory(handle: Any) -> int:
            try:
                return int(library.nvmlDeviceGetMemoryInfo(handle).total)
            except library.NVMLError:
                return 0

        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        return [(str(library.nvmlDeviceGetName(h)), memory(h)) for h in handles]


class Inventory:
    """The devices, and the attempt that holds each."""

    def __init__(
        self,
        gpus: int | Sequence[str],
        cpu_slots: int,
        places: Mapping[str, int] | None = None,
        *,
        others: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """`gpus`: number, or names (see `visible_gpus`). `places`: maximum number of concurrent attempts, by launcher, for
        launchers that use no device of this host. `others` returns the GPUs that other processes hold (see
        `device_holds`)."""
        self._others = others
        self.gpus = [f"cuda:{i}" for i in (range(gpus) if isinstance(gpus, int) else gpus)]
        self.cpus = [f"cpu:{i}" for i in range(cpu_slots)]
        self.places = {name: [f"{name}:{i}" for i in range(n)] for name, n in (places or {}).items()}
        self._held: dict[str, list[str]] = {}

    def need(self, wanted: Spec | Demand) -> Need:
        """The devices that a run needs on this host."""
        demand = wanted if isinstance(wanted, Demand) else Demand.of(wanted)
        return need(demand, len(self.gpus), len(self.cpus))

    def _all(self, device: str) -> list[str]:
        return {"cuda": self.gpus, "cpu": self.cpus, **self.places}.get(device, [])

    def free(self, device: str) -> list[str]:
        """Free devices of a kind."""
        others = set(self._others()) if device == "cuda" else ()
        return [d for d in self._unheld(device) if d not in others]

    def _unheld(self, device: str) -> list[str]:
        held = {d for devices in self._held.values() for d in devices}
        return [d for d in self._all(device) if d not in held]

    def fits(self, wanted: Spec | Demand) -> bool | None:
        """Whether enough devices are free now. None if the run needs more than this host has."""
        mine = self.need(wanted)
        if mine.count > len(self._all(mine.device)):
            return None
        return mine.count <= len(self.free(mine.device))

    def take(self, holder: str, spec: Spec) -> tuple[Need, list[str]]:
        """Assign devices to `holder`, for a run that fits."""
        mine = self.need(spec)
        # Another process may have taken a GPU since `fits`. The run is claimed, so it gets that GPU too.
        free = self.free(mine.device)
        devices = [*free, *(d for d in self._unheld(mine.device) if d not in free)][: mine.count]
        self._held[holder] = devices
        return mine, devices

    def restore(self, holder: str, devices: list[str]) -> None:
        """Note the devices that an adopted attempt holds already."""
        self._held[holder] = devices

    def release(self, holder: str) -> None:
        """Free the devices of `holder`."""
        self._held.pop(holder, None)

    @property
    def is_idle(self) -> bool:
        """Whether no device and no place is held."""
        return not self._held

    def describe(self) -> dict[str, int]:
        """Number of devices of each kind, and of places of each launcher that has any."""
        places = {name: len(all_of) for name, all_of in self.places.items() if all_of}
        return {"gpus": len(self.gpus), "cpus": len(self.cpus), **places}
