"""`sftd hold`, `sftd release`, `sftd pause`."""

from __future__ import annotations

import click

from sftd.cli import app
from sftd.cli.terminal import output


@click.command("hold")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the log.")
def hold_command(run: str, reason: str) -> None:
    """Keep a waiting RUN, or all waiting runs of a sweep, from starting until `sftd release`. Runs after it may start before it.

    \b
    Example:
      sftd hold brave-otter --reason "the data is not checked yet"
      sftd hold sweep-3aea38
    """
    from sftd.domain.run.state import WAITING
    from sftd.operations.commands import hold as hold_runs

    store = app.open_store(app.read_settings())

    def hold(run_id: str) -> None:
        hold_runs.hold(store, app.context(), run_id, app.user_name(), reason)
        output.console().print(f"[bold]{run_id}[/] is held; `sftd release {run_id}` lets it start")

    app.change_each(store, run, WAITING, hold)


@click.command("release")
@click.argument("run")
def release_command(run: str) -> None:
    """Return a held RUN, or all held runs of a sweep, to their old place in the queue.

    \b
    Example:
      sftd release brave-otter
      sftd release sweep-3aea38
    """
    from sftd.operations.commands import hold as hold_runs

    store = app.open_store(app.read_settings())

    def release(run_id: str) -> None:
        hold_runs.release(store, app.context(), run_id, app.user_name())
        output.console().print(f"[bold]{run_id}[/] waits for its turn; `sftd queue` shows the reason")

    app.change_each(store, run, {"held"}, release)


@click.command("pause")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the log.")
def pause_command(run: str, reason: str) -> None:
    """Stop RUN, or all active runs of a sweep, at the next step boundary, with a checkpoint, and free the devices.
    `sftd resume` continues a run.

    \b
    Example:
      sftd pause brave-otter --reason "the GPUs are needed until tonight"
      sftd pause sweep-3aea38
    """
    from sftd.domain.run.state import ACTIVE
    from sftd.operations.commands import hold as hold_runs

    store = app.open_store(app.read_settings())

    def pause(run_id: str) -> None:
        found = hold_runs.pause(store, app.context(), run_id, app.user_name(), reason)
        done = "is paused" if found.status == "paused" else "will checkpoint at its next step and pause"
        output.console().print(f"[bold]{run_id}[/] {done}")

    app.change_each(store, run, ACTIVE, pause)
