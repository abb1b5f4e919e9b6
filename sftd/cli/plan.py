"""`sftd plan`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from sftd.cli import app, output
from sftd.cli.hosts import known_hosts
from sftd.cli.numbers import FiniteRange
from sftd.cli.plan_view import print_plan

if TYPE_CHECKING:
    from sftd.domain.layout import ModelShape
    from sftd.domain.pace import Machine
    from sftd.domain.plan import Facts
    from sftd.domain.spec import Spec
    from sftd.wire.preflight import Preflight

_GIB = 2**30


@click.command("plan")
@click.argument("config", type=click.Path(allow_dash=True))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--devices",
    type=click.IntRange(1, 1024),
    help="So many devices, of all nodes together; else those of this host.",
)
@click.option(
    "--memory", type=FiniteRange(min=0.1, max=1e6), metavar="GIB", help="Memory of each device, in GiB."
)
@click.option("--device", metavar="NAME", help="Which device: `H100`, `A100`, …, or `cpu`; else this host's.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan, and the layouts found, as JSON.")
def plan_command(
    config: str,
    overrides: tuple[str, ...],
    devices: int | None,
    memory: float | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Say what the run of CONFIG will take, before it is submitted: memory of each rank, time, disk, and the best layout.

    Everything is checked as by `sftd submit`, and nothing is written. Memory is arithmetic over what the trainer
    allocates. Time goes by the pace of earlier runs of this model in the log, else by measured rates. For a
    machine that is not this one, say which: --devices, --memory, --device. docs/plan.md has the formulas.

    \b
    Example:
      sftd plan run.yaml
      sftd plan run.yaml --devices 8 --memory 80 --device H100
      sftd plan run.yaml training.micro_batch_size_per_gpu=8 --json
    """
    from sftd.domain import doubts
    from sftd.domain.plan import make_plan
    from sftd.domain.plan_search import search
    from sftd.wire import preflight, specfile

    spec, warnings = specfile.read(config, overrides, os.getcwd())
    found = preflight.inspect(spec, has_room=False)
    host = Host.find(spec, devices, memory, device)
    warnings = [*warnings, *found.warnings]
    if not (devices or memory or device):
        # For a machine that is not this one, these devices say nothing.
        warnings += doubts.devices(spec, known_hosts(app.read_settings()))
    facts = facts_of(found)
    calibration = known_pace(found.shape, host.machine)
    plan = make_plan(spec, facts, host.machine, calibration)
    layouts = search(
        spec, facts, host.machine, devices=host.devices, memory=host.memory, calibration=calibration
    )
    if as_json:
        best = layouts.best
        click.echo(
            output.json_line(
                {
                    **plan.as_json(),
                    "devices": host.devices,
                    "memory_bytes": host.memory,
                    "fits": host.fits(plan.needed, spec.world_size),
                    "best": {"set": best.changes, **best.plan.as_json()} if best else None,
                    "layouts_tried": layouts.tried,
                    "layouts_fit": layouts.fit,
                    "warnings": [str(w) for w in warnings],
                }
            )
        )
        return
    output.warn_all(warnings)
    print_plan(spec, facts, plan, layouts, host)


class Host:
    """The devices that a plan is for: how many, of how many bytes each (on CPUs: of the host)."""

    def __init__(self, machine: Machine, devices: int, memory: int, *, is_here: bool) -> None:
        self.machine = machine
        self.devices = devices
        self.memory = memory
        self.is_here = is_here

    @classmethod
    def find(
        cls, spec: Spec, devices: int | None = None, gib: float | None = None, name: str | None = None
    ) -> Host:
        """As the options say; what they leave open is this host's. Raises `Refused` where it has none to go by."""
        import psutil

        from sftd.domain.errors import Problem, Refused
        from sftd.domain.flops import device_bytes
        from sftd.domain.pace import Machine
        from sftd.launcher.inventory import gpus
        from sftd.wire.cores import usable_cores

        here = gpus()
        wanted = name or ("cpu" if spec.launch.device == "cpu" else "")
        if not wanted and not here and (spec.launch.device == "cuda" or devices or gib):
            # Somewhere else, on GPUs that are not named.
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
            what = f"how much memory a {title} has is not known"
            raise Refused(Problem("--memory", what, "say it: --memory GIB"))
        machine = Machine(device="cuda", name=title, cores=1)
        count = devices or (len(here) * spec.launch.nnodes if is_here else spec.world_size)
        return cls(machine, count, memory, is_here=is_here)

    def fits(self, needed: int, ranks: int) -> bool:
        """Whether ranks that need so many bytes each have them. On CPUs they share the host's memory."""
        return needed * (ranks if self.machine.device == "cpu" else 1) <= self.memory


def facts_of(found: Preflight) -> Facts:
    """What preflight found, for a plan."""
    from sftd.domain.plan import Facts

    return Facts(shape=found.shape, train=found.train, val=found.val, planned_steps=found.planned_steps)


def known_pace(shape: ModelShape, machine: Machine) -> float | None:
    """What earlier runs in the log say of the pace; None where there is no log, or nothing in it."""
    from sftd.domain.errors import SftdError
    from sftd.operations import planning

    try:
        store = app.open_existing_store(app.read_settings())
        return planning.calibration(store, shape, machine) if store else None
    except SftdError as error:
        output.note(f"The log is not asked for the pace of earlier runs: {error}")
        return None
