"""`sftd hold`, `sftd release`, `sftd pause`."""

from __future__ import annotations

import click

from sftd.cli import app, output


@click.command("hold")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the log.")
def hold_command(run: str, reason: str) -> None:
    """Keep a waiting RUN from starting, until `sftd release`. Runs behind it go ahead.

    \b
    Example:
      sftd hold brave-otter --reason "the data is not checked yet"
    """
    from sftd.operations import halting

    found = halting.hold(app.open_store(app.read_settings()), app.context(), run, app.user_name(), reason)
    output.console().print(f"[bold]{found.run_id}[/] is held; `sftd release {found.run_id}` lets it start")


@click.command("release")
@click.argument("run")
def release_command(run: str) -> None:
    """Let a held RUN wait for its turn again, in its old place.

    \b
    Example:
      sftd release brave-otter
    """
    from sftd.operations import halting

    found = halting.release(app.open_store(app.read_settings()), app.context(), run, app.user_name())
    output.console().print(f"[bold]{found.run_id}[/] waits for its turn; `sftd queue` shows what for")


@click.command("pause")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the log.")
def pause_command(run: str, reason: str) -> None:
    """Stop RUN at its next step boundary, with a checkpoint, and free its devices. `sftd resume` goes on with it.

    \b
    Example:
      sftd pause brave-otter --reason "the GPUs are needed until tonight"
    """
    from sftd.operations import halting

    found = halting.pause(app.open_store(app.read_settings()), app.context(), run, app.user_name(), reason)
    if found.status == "paused":
        output.console().print(f"[bold]{found.run_id}[/] is paused")
    else:
        output.console().print(f"[bold]{found.run_id}[/] will checkpoint at its next step and pause")
