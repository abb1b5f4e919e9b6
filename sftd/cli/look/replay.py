"""`sftd replay`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from rich.table import Table

    from sftd.domain.log.events import Recorded
    from sftd.domain.log.history import Steps
    from sftd.operations.queries.history import Chapter

# More validations or checkpoints of one stretch of steps are counted, not listed.
_LISTED = 4


@click.command("replay")
@click.argument("run")
@click.option(
    "--until",
    metavar="STEP|TIME|VERSION",
    help="Stop at a step (300), a version (v120), a time (2026-01-31T09:30), or some time ago (-2h).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the milestones and the whole state as JSON.")
def replay_command(run: str, until: str | None, as_json: bool) -> None:
    """Replay the log of RUN: its milestones in order, then its state, config and checkpoints at that moment.

    Nothing is computed or changed. Consecutive steps of an attempt are one line; `again` marks redone steps. A fork's history
    begins with its parents', up to the step of the fork. A time without a zone is local. `sftd events` has every event.

    \b
    Example:
      sftd replay brave-otter
      sftd replay brave-otter --until 300
      sftd replay brave-otter --until -2h --json | jq .state.spec
    """
    from sftd.domain.log.history import parse_moment
    from sftd.operations.queries import history

    context = app.context()
    moment = parse_moment(until, context.now()) if until is not None else None
    store = app.open_store(app.read_settings())
    story = history.chapters(store, app.resolve_run(store, run))
    if moment is not None:
        story = history.until(story, moment)
    if as_json:
        click.echo(output.json_line(_as_json(story)))
    else:
        _print(story)


def _as_json(story: list[Chapter]) -> dict[str, Any]:
    import msgspec

    from sftd.cli.terminal.run_details import state_json
    from sftd.domain.log.history import Steps, milestones

    def line(chapter: Chapter, item: Recorded | Steps) -> dict[str, Any]:
        if isinstance(item, Steps):
            fields = msgspec.to_builtins(item)
            fields["times"] = [output.iso(t) for t in item.times]
            return {"run_id": chapter.run_id, "type": "Steps", **fields}
        return {
            "run_id": chapter.run_id,
            "type": item.type,
            "version": item.version,
            "occurred_at": output.iso(item.occurred_at),
            "attempt": item.attempt,
            "payload": msgspec.to_builtins(item.event),
        }

    run = story[-1].run()
    return {
        "run_id": run.run_id,
        "version": run.version,
        "milestones": [line(chapter, item) for chapter in story for item in milestones(chapter.recorded)],
        "state": state_json(run),
    }


def _print(story: list[Chapter]) -> None:
    from sftd.cli.terminal.run_details import print_state

    out = output.console()
    for chapter in story:
        if len(story) > 1:
            until = f", up to step {chapter.last_step}" if chapter is not story[-1] else ""
            out.print(f"[bold]{chapter.run_id}[/]{until}")
        out.print(_table(chapter))
    last = story[-1].recorded[-1]
    out.print(f"State at v{last.version}, {output.clock(last.occurred_at)}", style="bold")
    out.print()
    run = story[-1].run()
    lr = f"{run.lr:.3g}" if run.lr is not None else ""
    print_state(run, story[-1].recorded, [("learning rate", lr), ("config", "\n".join(_changes(story[-1])))])


def _changes(chapter: Chapter) -> Iterator[str]:
    """The changes of the config so far."""
    from sftd.domain.log import events as e

    for r in chapter.recorded:
        if isinstance(r.event, e.RunForked | e.ResumeRequested):
            for key, (old, new) in r.event.changes.items():
                yield f"{key}: {old} → {new}  (v{r.version}, by {r.event.by})"


def _table(chapter: Chapter) -> Table:
    from rich.text import Text

    from sftd.domain.log.history import Steps, milestones

    table = output.table("time", "try", "what", "", right=["try"], dim=["time"], fold=[""])
    for item in milestones(chapter.recorded):
        if isinstance(item, Steps):
            style = "bold red" if item.anomalies else "yellow" if item.redone else ""
            name = f"steps {item.first}–{item.last}" if item.last > item.first else f"step {item.first}"
            detail = Text("; ".join(_of_steps(item)), "bold red" if item.anomalies else "")
            cells = (output.clock(item.times[0]), item.attempt, Text(name, style), detail)
        else:
            text = Text(output.summary(item.event))
            cells = (output.clock(item.occurred_at), item.attempt, Text(item.type), text)
        table.add_row(cells[0], str(cells[1] or ""), *cells[2:])
    return table


def _of_steps(steps: Steps) -> Iterator[str]:
    if steps.redone:
        yield "again"
    losses = [output.loss(steps.first_loss), output.loss(steps.last_loss)]
    yield "loss " + " → ".join(losses if steps.last > steps.first else losses[:1])
    if steps.validations:
        yield "validation " + _few([f"{output.loss(loss)} (step {step})" for step, loss in steps.validations])
    if steps.checkpoints:
        yield "saved " + _few([str(step) for step in steps.checkpoints])
    if steps.anomalies:
        step, what = steps.anomalies[0]
        yield f"{len(steps.anomalies)} anomalies, first at step {step}: {what}"


def _few(items: list[str]) -> str:
    return ", ".join(items) if len(items) <= _LISTED else f"{items[0]} … {items[-1]} ({len(items)} of them)"
