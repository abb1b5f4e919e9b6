"""The plan of a run: predicted memory of each rank, time and disk. Pure arithmetic over its facts."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.data.facts import DataFacts
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.batch import Workload, workload
from sftd.domain.plan.disk import Storage, storage
from sftd.domain.plan.duration import Machine, Pace, pace
from sftd.domain.plan.memory import Footprint, footprints, fullest, host_copy_bytes, needed
from sftd.domain.plan.sizes import weights_dtype
from sftd.domain.spec.spec import Spec


class PlanInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a run besides its spec. Steps up to `first_step` belong to a fork's parent."""

    shape: ModelShape
    train: DataFacts
    val: DataFacts | None
    planned_steps: int
    first_step: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The prediction. `memory` has one entry per pipeline stage; `host_copy` is in bytes of host memory, over all ranks."""

    machine: Machine
    ranks: int
    dtype: str
    work: Workload
    memory: list[Footprint]
    pace: Pace
    storage: Storage
    host_copy: int

    @property
    def fullest(self) -> Footprint:
        """The stage whose ranks need the most memory."""
        return fullest(self.memory)

    @property
    def needed(self) -> int:
        """Required bytes of each device; on CPUs, of the host per rank."""
        return needed(self.fullest, self.machine.device, self.ranks)

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON, with the totals."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        for stage, values in zip(self.memory, found["memory"], strict=True):
            values["total"] = stage.total
        found["peak_memory_bytes"] = self.fullest.total
        found["device_bytes_needed"] = self.needed
        found["pace"]["total"] = self.pace.total
        found["storage"] |= {"at_end": self.storage.at_end, "needed": self.storage.needed}
        return found


def make_plan(spec: Spec, facts: PlanInputs, machine: Machine, calibration: float | None = None) -> Plan:
    """The plan of a run on a machine; `calibration` is from earlier runs (see `Pace`)."""
    dtype = weights_dtype(spec, machine.device)
    work = workload(spec, facts.train, facts.planned_steps - facts.first_step, machine.device)
    disk = storage(spec, facts.shape, facts.planned_steps, dtype, facts.first_step)
    return Plan(
        machine=machine,
        ranks=spec.world_size,
        dtype=dtype,
        work=work,
        memory=footprints(spec, facts.shape, work, device=machine.device, dtype=dtype),
        pace=pace(
            spec,
            facts.shape,
            work,
            machine,
            val=facts.val,
            planned_steps=facts.planned_steps,
            first_step=facts.first_step,
            checkpoint_bytes=disk.checkpoint,
            calibration=calibration,
        ),
        storage=disk,
        host_copy=host_copy_bytes(spec, disk.checkpoint),
    )
