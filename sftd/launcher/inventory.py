"""Devices of this host: GPUs where there are any, CPU cores otherwise, and places of other launchers. Never oversubscribed."""

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
    "make `nvidia-smi` work here (load the driver, or give the container its GPUs); to train on CPU cores all the same, "
    "set CUDA_VISIBLE_DEVICES to nothing: `CUDA_VISIBLE_DEVICES= sftd daemon`"
)


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """The module pynvml, initialised; None where there is no NVIDIA driver. Raises `Refused` where there is one, but NVML does
    not list its GPUs: a daemon that takes that for a host without GPUs would silently train on CPUs."""
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
    with nvml() as asked:
        return int(asked.nvmlDeviceGetCount()) if asked is not None else 0


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that runs may be given, as CUDA_VISIBLE_DEVICES names them: all that NVML lists, or of these the ones that the
    variable leaves to this process, in its order. A part of a GPU (MIG) is known by its own name only. Raises `Refused` as
    `nvml` does, unless the variable leaves no GPU."""
    said = environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None and said.strip() in ("", "-1"):
        return []
    count = gpu_count()
    if said is None or not count:
        return [str(index) for index in range(count)]
    found: list[str] = []
    for given in map(str.strip, said.split(",")):
        name = given if given.isdecimal() or given.startswith("MIG-") else _index_of(given, count)
        # As CUDA does: nothing counts after a name that is none.
        if not name or (name.isdecimal() and int(name) >= count):
            break
        if name not in found:
            found.append(name)
    return found


def _index_of(uuid: str, count: int) -> str:
    """Number of the one GPU whose UUID begins so; empty when there is none."""
    if not uuid.startswith("GPU-"):
        return ""
    with nvml() as asked:
        uuids = [str(asked.nvmlDeviceGetUUID(asked.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
    found = [index for index, name in enumerate(uuids) if name.startswith(uuid)]
    return str(found[0]) if len(found) == 1 else ""


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of each GPU that NVML lists; none without a driver. 0 bytes where the driver does not say:
    of a GPU that shares the host's memory, or a slice of one. Raises `Refused` as `nvml` does."""
    with nvml() as asked:
        if asked is None:
            return []

        def memory(handle: Any) -> int:
            try:
                return int(asked.nvmlDeviceGetMemoryInfo(handle).total)
            except asked.NVMLError:
                return 0

        handles = [asked.nvmlDeviceGetHandleByIndex(i) for i in range(asked.nvmlDeviceGetCount())]
        return [(str(asked.nvmlDeviceGetName(h)), memory(h)) for h in handles]


class Inventory:
    """Which devices there are and which attempt holds which."""

    def __init__(
        self,
        gpus: int | Sequence[str],
        cpu_slots: int,
        places: Mapping[str, int] | None = None,
        *,
        others: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """`gpus`: how many, or which (see `visible_gpus`). `places`: by launcher, attempts that it may have
        at once, where they take no device of this host. `others` says which GPUs are held by processes that this inventory
        does not know (see `device_holds`)."""
        self._others = others
        self.gpus = [f"cuda:{i}" for i in (range(gpus) if isinstance(gpus, int) else gpus)]
        self.cpus = [f"cpu:{i}" for i in range(cpu_slots)]
        self.places = {name: [f"{name}:{i}" for i in range(n)] for name, n in (places or {}).items()}
        self._held: dict[str, list[str]] = {}

    def need(self, wanted: Spec | Demand) -> Need:
        """What a run takes here."""
        demand = wanted if isinstance(wanted, Demand) else Demand.of(wanted)
        return need(demand, len(self.gpus), len(self.cpus))

    def _all(self, device: str) -> list[str]:
        return {"cuda": self.gpus, "cpu": self.cpus, **self.places}.get(device, [])

    def free(self, device: str) -> list[str]:
        """Devices of a kind that nobody holds."""
        others = set(self._others()) if device == "cuda" else ()
        return [d for d in self._unheld(device) if d not in others]

    def _unheld(self, device: str) -> list[str]:
        held = {d for devices in self._held.values() for d in devices}
        return [d for d in self._all(device) if d not in held]

    def fits(self, wanted: Spec | Demand) -> bool | None:
        """True: free now. False: in use now. None: more than this host has."""
        mine = self.need(wanted)
        if mine.count > len(self._all(mine.device)):
            return None
        return mine.count <= len(self.free(mine.device))

    def take(self, holder: str, spec: Spec) -> tuple[Need, list[str]]:
        """Hand the devices of a run that fits to `holder`."""
        mine = self.need(spec)
        # Another may have come between asking and taking: the run that was claimed has its devices all the same.
        free = self.free(mine.device)
        devices = [*free, *(d for d in self._unheld(mine.device) if d not in free)][: mine.count]
        self._held[holder] = devices
        return mine, devices

    def restore(self, holder: str, devices: list[str]) -> None:
        """An adopted attempt holds these devices already."""
        self._held[holder] = devices

    def release(self, holder: str) -> None:
        """Take the devices of `holder` back."""
        self._held.pop(holder, None)

    def describe(self) -> dict[str, int]:
        """How many devices of each kind there are, and how many places of each launcher that has any."""
        places = {name: len(all_of) for name, all_of in self.places.items() if all_of}
        return {"gpus": len(self.gpus), "cpus": len(self.cpus), **places}
