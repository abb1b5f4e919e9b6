"""Devices of this host: GPUs where there are any, CPU cores otherwise. Never oversubscribed."""

from __future__ import annotations

import msgspec

from sftd.domain.spec import Spec


class Need(msgspec.Struct, frozen=True):
    """What an attempt takes: `count` devices of a kind; `threads` is OMP_NUM_THREADS of each rank."""

    device: str
    count: int
    threads: int


def gpu_count() -> int:
    """GPUs that NVML lists; 0 without a driver or without nvidia-ml-py."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


class Inventory:
    """Which devices there are and which attempt holds which."""

    def __init__(self, gpus: int, cpu_slots: int) -> None:
        self.gpus = [f"cuda:{i}" for i in range(gpus)]
        self.cpus = [f"cpu:{i}" for i in range(cpu_slots)]
        self._held: dict[str, list[str]] = {}

    def need(self, spec: Spec) -> Need:
        """What a run takes here. Without `launch.threads_per_rank` the ranks of a CPU run share all cores."""
        device = spec.launch.device
        if device == "auto":
            device = "cuda" if self.gpus else "cpu"
        ranks = spec.nproc_per_node
        if device == "cuda":
            return Need(
                "cuda",
                ranks,
                spec.launch.threads_per_rank or max(1, len(self.cpus) // max(1, len(self.gpus))),
            )
        threads = spec.launch.threads_per_rank or max(1, len(self.cpus) // ranks)
        # More ranks than cores is slow but works, as GPUs do not: it takes the whole machine.
        return Need("cpu", min(len(self.cpus), ranks * threads), threads)

    def _all(self, device: str) -> list[str]:
        return self.gpus if device == "cuda" else self.cpus

    def free(self, device: str) -> list[str]:
        """Devices of a kind that nobody holds."""
        held = {d for devices in self._held.values() for d in devices}
        return [d for d in self._all(device) if d not in held]

    def fits(self, spec: Spec) -> bool | None:
        """True: free now. False: in use now. None: more than this host has."""
        need = self.need(spec)
        if need.count > len(self._all(need.device)):
            return None
        return need.count <= len(self.free(need.device))

    def take(self, holder: str, spec: Spec) -> tuple[Need, list[str]]:
        """Hand the devices of a run that fits to `holder`."""
        need = self.need(spec)
        devices = self.free(need.device)[: need.count]
        self._held[holder] = devices
        return need, devices

    def restore(self, holder: str, devices: list[str]) -> None:
        """An adopted attempt holds these devices already."""
        self._held[holder] = devices

    def release(self, holder: str) -> None:
        """Take the devices of `holder` back."""
        self._held.pop(holder, None)

    def describe(self) -> dict[str, int]:
        """How many devices of each kind there are."""
        return {"gpus": len(self.gpus), "cpus": len(self.cpus)}
