"""`sftd import`."""

from __future__ import annotations

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted


@click.command("import")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Allow the run's model.trust_remote_code: commands may run Python code in its model folder.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print only the run's id, and no warnings.")
@click.option("--json", "as_json", is_flag=True, help="Print id, status and number of new events as JSON.")
def import_command(directory: str, trust_remote_code: bool, quiet: bool, as_json: bool) -> None:
    """Import the run in DIR, which was trained without a daemon.

    DIR is the folder that `python -m sftd.trainer` prints at its end. Afterwards the run is like any other. Import DIR again
    to add new events; a run that still trains is refused. The import changes nothing in DIR, and checkpoints stay where they
    are. If `sftd resume` continues the run, a daemon deletes checkpoints that `checkpoint.keep_last`, `keep_best` and
    `keep_every` do not keep, as the training command does. A run that was trained with `model.trust_remote_code` is refused
    unless you allow it here: the folder may come from another user.

    \b
    Example:
      torchrun --nproc-per-node=8 -m sftd.trainer run.yaml checkpoint.save_dir=out trainer.experiment_name=first
      sftd import out/first
    """
    from sftd.operations.commands import import_run

    settings = app.read_settings()
    app.make_home(settings)
    store = app.open_store(settings)
    done = import_run.take_in(store, app.context(), directory, trust_remote_code=trust_remote_code)
    run = done.run
    if not quiet:
        for path in done.missing:
            output.warn(f"the checkpoint {path} is missing: it can be neither resumed from nor exported")
        for path, reason in done.damaged.items():
            output.warn(f"the checkpoint {path} is damaged and will not be used: {reason}")
    if as_json:
        fields = {"run_id": run.run_id, "status": run.status, "new_events": done.new_events}
        click.echo(output.json_line(fields))
    elif quiet:
        click.echo(run.run_id)
    else:
        count = counted(done.new_events, "new event") if done.new_events else "nothing new"
        out = output.console()
        out.print(
            f"[bold]{run.run_id}[/]: {count}; {run.status}, at step {run.step} of {run.planned_steps}",
            soft_wrap=True,
        )
        out.print(f"Look at it with [bold]sftd show {run.run_id}[/]")
