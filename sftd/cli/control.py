"""`sftd resume`, `sftd cancel`."""

from __future__ import annotations

import click

from sftd.cli import app, output


@click.command("resume")
@click.argument("run")
@click.option(
    "--from-step", type=click.IntRange(min=0), help="Go on from this step's checkpoint; 0 begins anew."
)
def resume_command(run: str, from_step: int | None) -> None:
    """Queue another attempt of RUN, from its last published checkpoint.

    It stays the same run: steps that are done again must come out as the log has them, and are compared.

    \b
    Example:
      sftd resume brave-otter
      sftd resume brave-otter --from-step 100
    """
    from sftd.operations import runs

    found = runs.resume(app.open_store(app.read_settings()), app.context(), run, app.user_name(), from_step)
    checkpoint = found.restart_checkpoint
    start = f"step {checkpoint.step}" if checkpoint else "the pretrained model"
    output.console().print(f"[bold]{found.run_id}[/] is queued again, from {start}")


@click.command("cancel")
@click.argument("run")
@click.option("--reason", default="", help="Why, for the log.")
@click.option("--abandon", is_flag=True, help="Give up an attempt whose daemon is gone for good, unseen.")
def cancel_command(run: str, reason: str, abandon: bool) -> None:
    """End RUN: at the next step boundary, after a checkpoint. `sftd resume` can take it up again.

    \b
    Example:
      sftd cancel brave-otter --reason "wrong data"
      sftd cancel brave-otter --abandon     after its host was renamed or rebuilt
    """
    from sftd.operations import runs

    if abandon:
        found = runs.abandon(app.open_store(app.read_settings()), app.context(), run, app.user_name())
        output.console().print(
            f"[bold]{found.run_id}[/] is given up; make sure that nothing of it still runs"
        )
        return
    found = runs.cancel(app.open_store(app.read_settings()), app.context(), run, app.user_name(), reason)
    if found.status == "cancelled":
        output.console().print(f"[bold]{found.run_id}[/] is cancelled")
    else:
        output.console().print(f"[bold]{found.run_id}[/] will checkpoint at its next step and stop")
