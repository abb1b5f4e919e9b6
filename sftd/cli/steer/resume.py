"""`sftd resume`, `sftd cancel`."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.operations.commands.lifecycle import Ending


@click.command("resume")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--from-step",
    type=click.IntRange(min=0),
    help="Continue from this step's checkpoint; 0 starts from the beginning.",
)
def resume_command(run: str, overrides: tuple[str, ...], from_step: int | None) -> None:
    """Queue another attempt of RUN, from its last published checkpoint, with KEY=VALUE applied to its config.

    The run stays the same: redone steps are compared with the log and must match. So only keys that do not change its steps
    may change: layout, micro-batches, saving and retention, `launch.*`, and `trainer.max_steps` where the learning rates so
    far do not depend on it. To change any other key, use `sftd fork`.

    \b
    Example:
      sftd resume brave-otter
      sftd resume brave-otter --from-step 100
      sftd resume brave-otter model.megatron.tensor_model_parallel_size=2
    """
    from sftd.cli.plan.known_hosts import known_hosts
    from sftd.domain.run import decisions, trajectory
    from sftd.domain.run.state import ENDED
    from sftd.domain.submit.facts import SubmitFacts
    from sftd.launcher.processes import host_name
    from sftd.operations.commands import lifecycle
    from sftd.operations.queries import model_files, resolve
    from sftd.operations.queries import runs as run_queries
    from sftd.wire import preflight
    from sftd.wire.spec import file as spec_file

    settings = app.read_settings()
    store = app.open_store(settings)
    run = resolve.one_to_change(store, run, {"retrying", "paused", *ENDED})
    new, instead = None, ""
    now = run_queries.find_run(store, run)
    decisions.refuse_busy(now)
    pretrained = from_step == 0 or all(c.superseded for c in now.checkpoints)
    if overrides:
        spec, warnings = spec_file.change(now.spec, overrides, os.getcwd())
        inspected = preflight.inspect(
            spec,
            lambda _: trajectory.beginning(now),
            known=SubmitFacts(hosts=known_hosts(settings), has_checkpoint=not pretrained),
            home=settings.home,
        )
        for warning in (*warnings, *inspected.warnings):
            output.warn(str(warning))
        new = preflight.proposal(spec, inspected)
        step = [] if from_step is None else ["--from-step", str(from_step)]
        instead = shlex.join(["sftd", "fork", now.run_id, *step, *overrides])
    before = run_queries.find_run(store, run).restart_checkpoint
    host = host_name()
    record = model_files.recorded(store, now.run_id)
    if not model_files.check_unchanged(record, now.run_id, now.spec, pretrained=pretrained):
        output.note(model_files.unrecorded(now.run_id))
    found = lifecycle.resume(store, app.context(), run, app.user_name(), from_step, new, instead, host=host)
    checkpoint = found.restart_checkpoint
    if from_step is None and before is not None and before != checkpoint:
        output.warn(f"the checkpoint of step {before.step} is gone from the disk: {before.path}")
    start = f"step {checkpoint.step}" if checkpoint else "the pretrained model"
    output.console().print(
        f"[bold]{found.run_id}[/] is queued again, from {start} to step {found.planned_steps}"
    )


@click.command("cancel")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the log.")
@click.option("--now", is_flag=True, help="Kill it, without a checkpoint.")
@click.option(
    "--abandon",
    is_flag=True,
    help="Give up an attempt whose daemon will not return; its processes are not checked.",
)
def cancel_command(run: str, reason: str, now: bool, abandon: bool) -> None:
    """End RUN, or all runs of a sweep: at the next step boundary, after a checkpoint. `sftd resume` continues a run. Runs that
    wait for its success (`sftd submit --after`) are cancelled with it, and listed.

    \b
    Example:
      sftd cancel brave-otter --reason "wrong data"
      sftd cancel brave-otter --now         kill it: steps since the last checkpoint are lost
      sftd cancel brave-otter --abandon     after its host was renamed or rebuilt
      sftd cancel sweep-3aea38
    """
    from sftd.domain.run.state import ACTIVE, HALTED, WAITING
    from sftd.operations.commands import lifecycle

    store = app.open_store(app.read_settings())

    def end(run_id: str) -> None:
        if abandon:
            ending = lifecycle.abandon(store, app.context(), run_id, app.user_name())
            _print_ending(ending, "is given up; check that none of its processes still run")
            return
        ending = lifecycle.cancel(store, app.context(), run_id, app.user_name(), reason, now=now)
        if ending.run.status == "cancelled":
            _print_ending(ending, "is cancelled")
        elif ending.run.stop_now:
            _print_ending(ending, "is being killed")
        else:
            _print_ending(ending, "will checkpoint at its next step and stop")

    app.change_each(store, run, ACTIVE | WAITING | HALTED, end)


def _print_ending(ending: Ending, what: str) -> None:
    out = output.console()
    out.print(f"[bold]{ending.run.run_id}[/] {what}", soft_wrap=True)
    for dependent in ending.dependents:
        has = "is" if ending.run.status == "cancelled" else "will be"
        out.print(f"[bold]{dependent}[/] {has} cancelled with it (--after)", soft_wrap=True)
