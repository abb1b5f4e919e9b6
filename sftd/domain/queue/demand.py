"""What a run asks a host for, and how many of the host's devices that is."""

from __future__ import annotations

import msgspec

from sftd.domain.spec.launchers import kind_of
from sftd.domain.spec.spec import Spec

# The devices of a host: what a daemon calls them where it counts them, and the kind that each one's name begins with.
HOST_DEVICES = {"gpus": "cuda", "cpus": "cpu"}


class Demand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the scheduler needs to know of a spec. `ranks` are those of one machine, `world` all of them; all start or none
    does. `preemptible`: a waiting run of higher priority may take its place."""

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
    """What an attempt takes on a host: `count` devices of a kind; `threads` is OMP_NUM_THREADS of each rank. A launcher that
    does not use the host's devices gives each attempt one of its places: the kind is the launcher's name."""

    device: str
    count: int
    threads: int


def need(demand: Demand, gpus: int, cpus: int) -> Need:
    """What a run takes on a host with these devices. Without `launch.threads_per_rank` the ranks of a CPU run share all
    cores."""
    if not kind_of(demand.launcher).uses_host_devices:
        return Need(demand.launcher, 1, demand.threads or 1)
    device = demand.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda":
        return Need("cuda", demand.ranks, demand.threads or max(1, cpus // max(1, gpus)))
    threads = demand.threads or max(1, cpus // demand.ranks)
    # More ranks than cores is slow but works, as GPUs do not: it takes the whole machine.
    return Need("cpu", min(cpus, demand.ranks * threads), threads)
