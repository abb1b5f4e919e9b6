"""`sftd events`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from sftd.cli import app, output
from sftd.domain.words import counted

_POLL_SECONDS = 0.3
_PAGE = 1000


def describe(event: Any) -> str:
    """One line that says what matters of an event, and does nothing to a terminal, whoever wrote the words in it."""
    return output.printable(_described(event))


def _described(event: Any) -> str:
    from sftd.domain import events as e

    match event:
        case e.RunSubmitted():
            return f"{counted(event.planned_steps, 'step')}, spec {event.spec_digest[:12]}, by {event.user}"
        case e.RunForked():
            changed = "".join(f"; {change}" for change in output.changes(event.changes))
            return f"from step {event.step} of {event.parent}, by {event.by}{changed}"
        case e.CheckpointPinned():
            return f"step {event.step}, from which {event.fork} was forked"
        case e.CheckpointUnpinned():
            return f"step {event.step}, from which {event.fork} was forked, which is removed"
        case e.AttemptClaimed():
            start = f"step {event.from_step}" if event.from_step else "the pretrained model"
            return f"from {start}, by {event.daemon}"
        case e.AttemptLaunched():
            if not event.pid:
                return f"handed to Slurm on {event.host}"
            return f"pid {event.pid} on {event.host}, {', '.join(event.devices)}"
        case e.AttemptAdopted():
            return (f"pid {event.pid}, " if event.pid else "") + f"by {event.daemon}"
        case e.ModelLoaded():
            millions = event.parameters / 1e6
            return f"{event.architecture}, {millions:.1f} M parameters, {event.dtype} on {event.device}, {event.seconds:.1f} s"
        case e.WeightsDigested():
            return f"{counted(len(event.files), 'file')}, {output.size(event.bytes)}, {event.seconds:.1f} s"
        case e.DataBound():
            lost = f", {event.truncated_rows} truncated, {event.dropped_rows} dropped"
            return f"{counted(event.train_rows, 'row')}, {event.val_rows} for validation{lost}"
        case e.TrainingResumed():
            return f"from step {event.step}"
        case e.StepCompleted():
            return (
                f"step {event.step}  loss {output.loss(event.loss)}  grad norm {event.grad_norm:.3f}  "
                f"lr {event.lr:.2e}  {counted(event.tokens_real, 'token')}  {event.seconds:.2f} s"
                + (f"  MFU {event.mfu:.1%}" if event.mfu is not None else "")
                + (f"  {output.memory(event.peak_memory_bytes)}" if event.peak_memory_bytes else "")
            )
        case e.ValidationCompleted():
            return f"step {event.step}  loss {output.loss(event.loss)} over {counted(event.tokens, 'token')}"
        case e.SampleGenerated():
            return f"step {event.step}  {event.prompt!r} → {event.text!r}"
        case e.CheckpointStarted():
            return f"step {event.step}"
        case e.CheckpointPublished():
            return f"step {event.step}  {output.size(event.bytes)} in {event.seconds:.1f} s"
        case e.CheckpointRejected():
            return f"step {event.step}: {event.reason}"
        case e.CheckpointDeleted():
            return f"step {event.step}  {output.size(event.bytes)} ({event.reason})"
        case e.CheckpointReduced():
            return f"step {event.step}  {output.size(event.bytes)} of weights kept, {output.size(event.freed_bytes)} freed"
        case e.AnomalyDetected():
            return f"step {event.step}: " + "  ".join((event.what, *_details(event.detail)))
        case e.SamplesSkipped():
            return f"back to step {event.step}, on at sample {event.sample}: {event.reason}"
        case e.StopRequested():
            how = "killed, " if event.now else ""
            follows = "" if event.then == "cancelled" else f"then {event.then}, "
            return f"{how}{follows}by {event.by}" + (f": {event.reason}" if event.reason else "")
        case e.RunHeld():
            return f"by {event.by}" + (f": {event.reason}" if event.reason else "")
        case e.RunReleased():
            return f"by {event.by}"
        case e.RunDeferred():
            return f"until {', '.join(event.after)} succeeded"
        case e.SweepJoined():
            return f"{event.sweep}: " + ", ".join(f"{key}={value}" for key, value in event.values.items())
        case e.AttemptPaused():
            return f"at step {event.step}, by {event.by}"
        case e.AttemptPreempted():
            return f"at step {event.step}, {event.reason or f'by {event.by_run}'}; queued again"
        case e.JobReported():
            parts = (f"job {event.job}" if event.job else "", event.state, event.reason, event.nodes)
            return "  ".join(part for part in parts if part)
        case e.ResumeRequested():
            where = "the last checkpoint" if event.from_step is None else f"step {event.from_step}"
            changed = "".join(f"; {change}" for change in output.changes(event.changes))
            return f"from {where}, by {event.by}{changed}"
        case e.AttemptFailed():
            return f"{event.cause}: {event.message}"
        case e.AttemptLost():
            return str(event.message)
        case e.RunSucceeded():
            return f"{counted(event.steps, 'step')}, {counted(event.tokens, 'trained token')}"
        case e.RunFailed():
            return f"{event.cause}: {event.message}"
        case e.RunCancelled():
            return f"by {event.by}"
        case e.RunRemoved():
            return f"{output.size(event.freed_bytes)} freed, by {event.by}"
        case e.ModelExported():
            return f"step {event.step}  {output.size(event.bytes)} {event.dtype} to {event.path}"
        case e.ModelRegistered():
            return f"step {event.step} as {event.name} version {event.model_version}, by {event.by}"
        case e.SystemSampled():
            return _sampled(event)
        case e.ReplayVerified():
            how = "bit for bit" if event.is_exact else "except for rounding"
            return f"steps {event.from_step + 1} to {event.to_step} came out as the log has them, {how}, by {event.by}"
        case e.ReplayDiverged():
            differs = f"; differs: {', '.join(event.environment)}" if event.environment else ""
            return f"step {event.step} came out otherwise ({', '.join(event.detail)}){differs}, by {event.by}"
    return ""


def _sampled(event: Any) -> str:
    gpus = [
        f"GPU {gpu.index}"
        + (f" {gpu.utilization_percent:.0f} %" if gpu.utilization_percent is not None else "")
        + (f" {output.memory(gpu.memory_used_bytes)}" if gpu.memory_used_bytes is not None else "")
        for gpu in event.gpus
    ]
    return ", ".join([f"CPU {event.cpu_percent:.0f} %", output.memory(event.memory_used_bytes), *gpus])


@click.command("events")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("-t", "--type", "types", multiple=True, help="Only events of this type; repeatable.")
@click.option(
    "--json", "as_json", is_flag=True, help="One event a line, with the fields of the events table."
)
def events_command(run: str, follow: bool, types: tuple[str, ...], as_json: bool) -> None:
    """Print a run's events in order.

    \b
    Example:
      sftd events -f brave-otter
      sftd events brave-otter --json -t StepCompleted | jq .payload.loss
    """
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.events import EVENT_TYPES

    for name in types:
        if name not in EVENT_TYPES:
            raise Refused(Problem("--type", f"no event is called {name}", "one of " + ", ".join(EVENT_TYPES)))
    store = app.open_store(app.read_settings())
    run_id = app.pick(store, run)
    version = 0
    if follow:
        output.when_interrupted(f"{run_id} continues.")
    while True:
        # Asked first: an event that comes after the end of the run is then read by this round.
        ended = _has_ended(store, run_id)
        version = _print_events(store, run_id, version, types, as_json)
        if not follow or ended:
            return
        time.sleep(_POLL_SECONDS)


def _has_ended(store: Any, run_id: str) -> bool:
    from sftd.domain.run import ENDED
    from sftd.operations import reading

    return reading.find_run(store, run_id).status in ENDED


def _print_events(store: Any, run_id: str, version: int, types: tuple[str, ...], as_json: bool) -> int:
    """Print what comes after `version`, a page at a time: no reader holds the database while a person reads."""
    from sftd.operations import reading

    while True:
        if as_json:
            rows = reading.raw_events(store, run_id, version, types, _PAGE)
            for row in rows:
                click.echo(_json_event(row))
            read, last = len(rows), rows[-1]["version"] if rows else version
        else:
            events = reading.run_events(store, run_id, version, types, _PAGE)
            for r in events:
                attempt = f"#{r.attempt}" if r.attempt else ""
                click.echo(f"{output.clock(r.occurred_at)}  {attempt:>3}  {r.type:<20} {describe(r.event)}")
            read, last = len(events), events[-1].version if events else version
        version = last
        if read < _PAGE:
            return version


def _json_event(row: dict[str, Any]) -> str:
    import msgspec

    times = {name: output.iso(row[name]) for name in ("occurred_at", "recorded_at")}
    return output.json_line({**row, **times, "payload": msgspec.Raw(row["payload"].encode())})


def _details(detail: dict[str, Any]) -> Iterator[str]:
    """What an anomaly says of itself: numbers in full where two are compared, for they may differ in the last digit."""

    def short(value: object) -> str:
        text = str(value)
        return text[:12] if len(text) == 64 and " " not in text else text

    for name, value in detail.items():
        label = name.removesuffix("_digest").replace("_", " ")
        if isinstance(value, dict) and value.keys() == {"recorded", "redone"}:
            yield f"{label}: log {short(value['recorded'])}, now {short(value['redone'])}"
        elif value is not None:
            yield f"{label} {value:.6g}" if isinstance(value, float) else f"{label} {short(value)}"
