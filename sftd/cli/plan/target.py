"""The devices that a plan is for, and their pace in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.domain.model.shape import ModelShape
    from sftd.domain.plan.duration import Machine
    from sftd.domain.plan.plan import PlanInputs
    from sftd.domain.spec.spec import Spec
    from sftd.wire.preflight import Preflight

_GIB = 2**30


class Target:
    """The devices that a plan is for: their number, and the memory of each in bytes (on CPUs: the host's)."""

    def __init__(self, machine: Machine, devices: int, memory: int, *, is_here: bool) -> None:
        self.machine = machine
        self.devices = devices
        self.memory = memory
        self.is_here = is_here

    @classmethod
    def find(
        cls, spec: Spec, devices: int | None = None, gib: float | None = None, name: str | None = None
    ) -> Target:
        """The devices that the options name, completed with this host's. Raises `Refused` for a device of unknown memory."""
        import psutil

        from sftd.domain.errors import Problem, Refused
        from sftd.domain.model.flops import device_bytes
        from sftd.domain.plan.duration import Machine
        from sftd.launcher.inventory import gpus
        from sftd.wire.cores import usable_cores

        here = gpus()
        wanted = name or ("cpu" if spec.launch.device == "cpu" else "")
        if not wanted and not here and (spec.launch.device == "cuda" or devices or gib):
            # GPUs of another host, of unknown type.
            wanted = "H100"
        if wanted.lower() == "cpu" or not (wanted or here):
            memory = int(gib * _GIB) if gib else int(psutil.virtual_memory().total)
            cores = usable_cores()
            machine = Machine(device="cpu", name="cpu", cores=cores)
            return cls(machine, devices or spec.world_size, memory, is_here=not gib)
        is_here = bool(here) and (not wanted or wanted.upper() in here[0][0].upper())
        title = here[0][0] if is_here else wanted
        memory = int(gib * _GIB) if gib else (here[0][1] if is_here else device_bytes(wanted))
        if not memory:
            what = f"the memory of a {title} is not known"
            raise Refused(Problem("--memory", what, "use --memory GIB"))
        machine = Machine(device="cuda", name=title, cores=1)
        count = devices or (len(here) * spec.launch.nnodes if is_here else spec.world_size)
        return cls(machine, count, memory, is_here=is_here)

    def fits(self, needed: int, ranks: int) -> bool:
        """Whether ranks that need `needed` bytes each have them. On CPUs they share the host's memory."""
        return needed * (ranks if self.machine.device == "cpu" else 1) <= self.memory


def plan_facts(found: Preflight) -> PlanInputs:
    """The inputs of a plan, from a preflight."""
    from sftd.domain.plan.plan import PlanInputs

    return PlanInputs(shape=found.shape, train=found.train, val=found.val, planned_steps=found.planned_steps)


def known_pace(shape: ModelShape, machine: Machine) -> float | None:
    """The pace of earlier runs; None where there is no log, or no such run."""
    from sftd.domain.errors import SftdError
    from sftd.operations.queries import plan

    try:
        store = app.open_existing_store(app.read_settings())
        return plan.calibration(store, shape, machine) if store else None
    except SftdError as error:
        output.note(f"The pace of earlier runs is not used: {error}")
        return None
