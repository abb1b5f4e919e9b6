"""The resources that a run requires, and the number of a host's devices that it takes."""

from __future__ import annotations

import msgspec

from sftd.domain.spec.launch.launchers import kind_of
from sftd.domain.spec.spec import Spec

# Name of the device count in a daemon's inventory → device kind, which is the prefix of each device's name.
HOST_DEVICES = {"gpus": "cuda", "cpus": "cpu"}


class Demand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of a spec that the scheduler needs. `ranks` is per machine, `world` the total; either all ranks start or none.
    `preemptible`: a waiting run of higher priority may take its place."""

    ranks: int = 1
    world: int = 1
    device: str = "auto"
    threads: int | None = None
    preemptible: bool = False
    launcher: str = "local"

    @classmethod
    def of(cls, spec: Spec) -> Demand:
        """The demand of a spec."""
        return cls(
            ranks=spec.nproc_per_node,
            world=spec.world_size,
            device=spec.launch.device,
            threads=spec.launch.threads_per_rank,
            preemptible=spec.launch.preemptible,
            launcher=spec.launch.launcher,
        )


class Need(msgspec.Struct, frozen=True):
    """The devices that an attempt takes on a host: `count` of kind `device`. `threads` is OMP_NUM_THREADS of each rank. A
    launcher that does not use the host's devices gives each attempt one place, whose kind is the launcher's name."""

    device: str
    count: int
    threads: int


def need(demand: Demand, gpus: int, cpus: int) -> Need:
    """The need of a run on a host with these devices. Without `launch.threads_per_rank` the ranks of a CPU run share all
    cores."""
    if not kind_of(demand.launcher).uses_host_devices:
        return Need(demand.launcher, 1, demand.threads or 1)
    device = demand.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda":
        return Need("cuda", demand.ranks, demand.threads or max(1, cpus // max(1, gpus)))
    threads = demand.threads or max(1, cpus // demand.ranks)
    # More ranks than cores are slow but work, in contrast to GPUs. Such a run takes the whole machine.
    return Need("cpu", min(cpus, demand.ranks * threads), threads)
