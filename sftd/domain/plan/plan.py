"""What a run will take, before it is started: memory of each rank, time, disk. Pure arithmetic over its facts."""

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
    """What is known of a run in addition to its spec. Steps up to `first_step` belong to a fork's parent."""

    shape: ModelShape
    train: DataFacts
    val: DataFacts | None
    planned_steps: int
    first_step: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The prediction. `memory` has each pipeline stage; `host_copy` is the host's, of all ranks."""

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
        """The stage whose ranks need the most."""
        return fullest(self.memory)

    @property
    def needed(self) -> int:
        """Bytes that each device, or on CPUs the host for each rank, must have."""
        return needed(self.fullest, self.machine.device, self.ranks)

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the sums."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        for stage, values in zip(self.memory, found["memory"], strict=True):
            values["total"] = stage.total
        found["peak_memory_bytes"] = self.fullest.total
        found["device_bytes_needed"] = self.needed
        found["pace"]["total"] = self.pace.total
        found["storage"] |= {"at_end": self.storage.at_end, "needed": self.storage.needed}
        return found


def make_plan(spec: Spec, facts: PlanInputs, machine: Machine, calibration: float | None = None) -> Plan:
    """The prediction for a run on a machine; `calibration` is that of earlier runs (see `Pace`)."""
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
