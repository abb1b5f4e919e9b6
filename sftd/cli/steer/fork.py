"""`sftd fork`, `sftd lineage`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.operations.queries.forks import Member


@click.command("fork")
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--from-step",
    type=click.IntRange(min=0),
    help="Start from this step's checkpoint, 0 from the pretrained model; the newest if not given.",
)
@click.option(
    "--changed-model",
    is_flag=True,
    help="Use the current model folder although it changed since RUN was submitted.",
)
@click.option(
    "-q", "--quiet", is_flag=True, help="Print the new run's id alone on stdout; warnings go to stderr."
)
@click.option("--wait", is_flag=True, help="Wait for the run to end; exit with 0 only if it succeeded.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and queue nothing; print the resolved spec, as JSON where stdout is not a terminal.",
)
@click.option("--json", "as_json", is_flag=True, help="Print id, digest, steps and warnings as JSON.")
def fork_command(
    run: str,
    overrides: tuple[str, ...],
    from_step: int | None,
    changed_model: bool,
    quiet: bool,
    wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Queue a new run that starts from a checkpoint of RUN, with KEY=VALUE applied to RUN's config.

    Steps count from RUN's first: trainer.max_steps includes RUN's steps, and the learning rate is the new config's at that
    step. With the same data in the same order, the fork continues with the sample after RUN's last one, else with the first
    sample. The checkpoint is kept as long as the log.

    \b
    Example:
      sftd fork brave-otter optimizer.lr=5e-6
      sftd fork brave-otter --from-step 100 trainer.max_steps=400 trainer.experiment_name=longer
    """
    from sftd.cli.plan.known_hosts import known_hosts
    from sftd.cli.submit.answers import announce, print_dry_run
    from sftd.domain.errors import Problem
    from sftd.domain.run import decisions, trajectory
    from sftd.operations.commands import lifecycle
    from sftd.operations.queries import forks, resolve
    from sftd.wire import preflight
    from sftd.wire.spec import file as spec_file

    settings = app.read_settings()
    store = app.open_store(settings)
    parent, point = forks.find(store, resolve.one_to_change(store, run), from_step)
    spec, warnings = spec_file.change(parent.spec, overrides, os.getcwd())
    hosts = known_hosts(settings)
    found = forks.inspect(store, parent, point, spec, settings.home, hosts=hosts, changed_model=changed_model)
    warnings = [*warnings, *found.warnings]
    if not trajectory.changes(parent.spec, spec) and not changed_model:
        warnings.append(Problem("KEY=VALUE", f"no setting changes: the fork will repeat {parent.run_id}"))
    step = point.step if point else 0
    if dry_run:
        # Raises `Refused` as a real fork would, and writes nothing.
        decisions.fork(parent, app.user_name(), step, preflight.proposal(spec, found))
        print_dry_run(spec, found, warnings, as_json=as_json)
        return
    run_id = lifecycle.fork(store, app.context(), parent.run_id, step, spec, found, warnings, app.user_name())
    text = f"is queued: from step {step} of {parent.run_id} to step {found.planned_steps}"
    announce(settings, store, run_id, spec, found, warnings, text, quiet=quiet, as_json=as_json, wait=wait)


@click.command("lineage")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print each tree as a line of nested JSON.")
def lineage_command(run: str, as_json: bool) -> None:
    """Draw the tree of forks that RUN belongs to, from its oldest ancestor; for a sweep, the tree of each run.

    \b
    Example:
      sftd lineage brave-otter
    """
    from sftd.operations.queries import forks

    store = app.open_store(app.read_settings())
    # Runs of a sweep may share a tree.
    trees: dict[str, tuple[str, Member]] = {}
    for run_id in app.resolve_runs(store, [run]):
        _, root = forks.lineage(store, run_id)
        trees.setdefault(root.run_id, (run_id, root))
    for run_id, root in trees.values():
        if as_json:
            click.echo(output.json_line(_member_json(root, run_id)))
            continue
        for line in _tree(root, run_id, "", ""):
            click.echo(line)


def _member_json(member: Member, asked: str) -> dict[str, Any]:
    import msgspec

    fields = {k: v for k, v in msgspec.structs.asdict(member).items() if k != "forks"}
    for name in ("loss", "val_loss"):
        fields[name] = output.number(fields[name])
    return fields | {
        "asked": member.run_id == asked,
        "forks": [_member_json(child, asked) for child in member.forks],
    }


def _tree(member: Member, asked: str, first: str, rest: str) -> Iterator[str]:
    facts = [
        click.style(member.run_id, bold=True) + (" ◀" if member.run_id == asked else ""),
        output.styled("status", member.status),
        f"{member.step}/{member.planned_steps}",
    ]
    facts += [
        f"{name} {output.loss(value)}"
        for name, value in (("loss", member.loss), ("val", member.val_loss))
        if value
    ]
    yield first + "  ".join(facts)
    bar = "│  " if member.forks else "   "
    if member.parent is not None:
        yield f"{rest}{bar}from step {member.forked_at}" + "".join(
            f"\n{rest}{bar}  {change}" for change in output.changes(member.changes)
        )
    for i, child in enumerate(member.forks):
        is_last = i == len(member.forks) - 1
        yield from _tree(
            child, asked, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  ")
        )
