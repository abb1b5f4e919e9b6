"""`sftd rm`."""

from __future__ import annotations

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted


@click.command("rm")
@click.argument("runs", metavar="RUN|SWEEP...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
def rm_command(runs: tuple[str, ...], yes: bool) -> None:
    """Remove each RUN: delete its checkpoints, attempts and logs on this host, and hide it from `sftd ls`.

    Its events stay in the database: `sftd ls --removed` lists it, and `show`, `events` and `compare` still work. Exported models
    stay where they are. A run that has not ended is refused, and so is one from whose checkpoints a fork starts: remove the
    fork first.

    \b
    Example:
      sftd rm brave-otter
      sftd rm brave-otter calm-heron --yes
      sftd gc --run brave-otter --all       its checkpoints alone
    """
    from sftd.domain.run.state import ENDED
    from sftd.operations.commands import remove
    from sftd.operations.driving import checkpoints
    from sftd.operations.queries import resolve

    settings = app.read_settings()
    store, context, user = app.open_store(settings), app.context(), app.user_name()
    run_ids = dict.fromkeys(
        run_id for text in runs for run_id in resolve.several_to_change(store, text, ENDED)
    )
    found = [remove.belongings(store, settings.home, run_id, by=user) for run_id in run_ids]
    if not yes:
        for each in found:
            run = each.run
            name = run.spec.trainer.experiment_name
            click.echo(
                f"{run.run_id}  {run.status}  step {run.step}/{run.planned_steps}  {output.size(each.bytes):>8}"
                + (f"  {output.printable(name)}" if name else ""),
                err=True,
            )
        total = output.size(sum(each.bytes for each in found))
        app.confirm(f"Remove {counted(len(found), 'run')} and delete {total}?")
    for each in found:
        elsewhere = [c.path for c in each.run.checkpoints if not c.is_parents and checkpoints.is_missing(c)]
        freed = remove.remove(store, context, settings.home, each.run.run_id, user)
        click.echo(f"{each.run.run_id} is removed: {output.size(freed)} freed")
        for path in elsewhere:
            output.warn(f"{output.printable(path)} was not on this host: delete it where it is")
