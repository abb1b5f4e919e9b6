"""`sftd plan`."""

from __future__ import annotations

import os
from typing import Any

import click

from sftd.cli import app
from sftd.cli.plan.known_hosts import known_hosts
from sftd.cli.plan.target import Target, known_pace, plan_facts
from sftd.cli.plan.view import print_plan
from sftd.cli.terminal import output
from sftd.cli.terminal.types import FiniteRange


@click.command("plan")
@click.argument("config", type=click.Path(allow_dash=True))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--devices",
    type=click.IntRange(1, 1024),
    help="Number of devices on all nodes together; this host's if not given.",
)
@click.option(
    "--memory", type=FiniteRange(min=0.1, max=1e6), metavar="GIB", help="Memory of each device, in GiB."
)
@click.option(
    "--device", metavar="NAME", help="Device: `H100`, `A100`, …, or `cpu`; this host's if not given."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan, and the layouts found, as JSON.")
def plan_command(
    config: str,
    overrides: tuple[str, ...],
    devices: int | None,
    memory: float | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Estimate memory of each rank, time and disk of the run of CONFIG, and find the best layout.

    Everything is checked as by `sftd submit`, and nothing is written. Memory is computed from what the trainer allocates. Time
    is estimated from the pace of earlier runs of this model in the log, else from measured rates. Where the run does not fit, LoRA,
    QLoRA and a lean optimizer are planned beside it. To plan for another machine, use --devices, --memory and --device.
    docs/plan.md has the formulas.

    \b
    Example:
      sftd plan run.yaml
      sftd plan run.yaml --devices 8 --memory 80 --device H100
      sftd plan run.yaml training.micro_batch_size_per_gpu=8 --json
    """
    from sftd.domain.plan.plan import make_plan
    from sftd.domain.plan.search import alternatives, search
    from sftd.domain.submit.facts import SubmitFacts
    from sftd.wire import preflight
    from sftd.wire.spec import file as spec_file

    spec, warnings = spec_file.read(config, overrides, os.getcwd())
    # The known hosts' devices do not matter for another machine.
    hosts = [] if devices or memory or device else known_hosts(app.read_settings())
    found = preflight.inspect(spec, known=SubmitFacts(hosts=hosts), has_room=False)
    target = Target.find(spec, devices, memory, device)
    warnings = [*warnings, *found.warnings]
    facts = plan_facts(found)
    calibration = known_pace(found.shape, target.machine)
    plan = make_plan(spec, facts, target.machine, calibration)
    given: dict[str, Any] = {"devices": target.devices, "memory": target.memory, "calibration": calibration}
    layouts = search(spec, facts, target.machine, **given)
    fits = target.fits(plan.needed, spec.world_size)
    instead = {} if fits and layouts.best else alternatives(spec, facts, target.machine, **given)
    if as_json:
        best = layouts.best
        click.echo(
            output.json_line(
                {
                    **plan.as_json(),
                    "devices": target.devices,
                    "memory_bytes": target.memory,
                    "fits": fits,
                    "best": {"set": best.changes, **best.plan.as_json()} if best else None,
                    "alternatives": {
                        name: {
                            "set": choice.changes,
                            "fits": target.fits(choice.plan.needed, choice.spec.world_size),
                            **choice.plan.as_json(),
                        }
                        for name, choice in instead.items()
                    },
                    "layouts_tried": layouts.tried,
                    "layouts_fit": layouts.fit,
                    "warnings": [str(w) for w in warnings],
                }
            )
        )
        return
    output.warn_all(warnings)
    print_plan(spec, facts, plan, layouts, target, instead)
