"""What must hold of a database and its homes after faults, and how an undisturbed run went. Nothing here writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftd.domain.log import events as e
from sftd.operations.queries.runs import list_runs
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.wire.attempt import journal
from tests.builders.process.homes import Home

_LOST = (e.AttemptFailed, e.AttemptLost)
_CHECKPOINT_FAILED = "checkpoint_failed"
# Training must continue through these: an attempt that also met another fault ended by that one.
_SPARE_TRAINING = (
    "fill the disk",
    "freeze a daemon past its lease",
    "kill a daemon",
    "restart PostgreSQL",
    "skew a daemon's clock",
)


@dataclass
class Touch:
    """A fault, and the attempts (run, number) that ran where it struck."""

    attempts: list[tuple[str, int]]
    fault: str = ""

    def shown(self) -> str:
        """Its attempts, for people."""
        return "".join(f" {run_id}/{number}" for run_id, number in self.attempts)


@dataclass
class Tally:
    """Faults, their results, and every violation: `wrong` must stay empty."""

    touches: list[Touch] = field(default_factory=list)
    not_injected: dict[str, str] = field(default_factory=dict)
    # Attempts that a person gave up: what the log had not taken in by then, it never will.
    given_up: set[tuple[str, int]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    refused_starts: int = 0
    runs: int = 0
    attempts: int = 0
    adoptions: int = 0
    events: int = 0
    steps: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)

    def table(self, title: str) -> Iterator[str]:
        """In Markdown: each fault, how often it was injected, and how many attempts ended with it as their last one."""
        yield f"| {title} | injected | attempts ended by it |"
        yield "|---|---|---|"
        injected = Counter(touch.fault for touch in self.touches)
        for name in [*dict.fromkeys(sorted(injected)), *sorted(self.restarts.keys() - injected.keys())]:
            yield f"| {name} | {injected[name]} | {self.restarts[name]} |"
        for name, why in self.not_injected.items():
            yield f"| {name} | NOT INJECTED: {why} | |"
        yield f"| all | {sum(injected.values())} | {sum(self.restarts.values())} |"
        yield f"| runs, attempts, adoptions | {self.runs}, {self.attempts}, {self.adoptions} | |"
        yield f"| daemons that found no server at their start, and ended | {self.refused_starts} | |"
        yield f"| events, of which steps that were compared | {self.events:,}, {self.steps:,} | |"
        yield f"| **wrong** | {len(self.wrong)} | |"


@dataclass
class Numbers:
    """What a run must come to: the numbers of each step and validation, and the bytes of its last checkpoint."""

    steps: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    validations: dict[int, str] = field(default_factory=dict)
    final: dict[str, str] = field(default_factory=dict)


Reference = list[Numbers]


def read_reference(store: Store, run_ids: list[str]) -> Reference:
    """What runs that nobody disturbed came to, in their order."""
    found = []
    for run_id in run_ids:
        events = _stream(store, run_id)
        assert [r.type for r in events if r.type.startswith(("Attempt", "Run"))] == [
            "RunSubmitted",
            "AttemptClaimed",
            "AttemptLaunched",
            "RunSucceeded",
        ]
        found.append(_numbers(events))
    return found


def check(
    store: Store, submitted: dict[str, int], reference: Reference, homes: list[Home], tally: Tally
) -> None:
    """Compare everything with everything. `submitted` maps each run to its place in `reference`."""
    checked = homes[0].run("db", "check", check=None)
    if checked.returncode:
        tally.wrong.append(f"sftd db check: {checked.stdout}{checked.stderr}")
    listed = {row.run_id: row for row in list_runs(store)}
    if listed.keys() != submitted.keys():
        tally.wrong.append(f"runs lost or not submitted: {sorted(listed.keys() ^ submitted.keys())}")
    for run_id, variant in submitted.items():
        events = _stream(store, run_id)
        tally.runs += 1
        tally.events += len(events)
        tally.adoptions += sum(r.type == "AttemptAdopted" for r in events)
        said = [
            *_end(events, reference[variant]),
            *_every_step(events, reference[variant], tally),
            *_attempts(events, homes, tally),
        ]
        tally.wrong += [f"{run_id}: {what}" for what in said]
        _blame(run_id, events, tally)


def _stream(store: Store, run_id: str) -> list[e.Recorded]:
    with store.read() as connection:
        return list(event_store.read_stream(connection, run_id))


def _exact(s: e.StepCompleted) -> tuple[Any, ...]:
    return s.loss.hex(), s.grad_norm.hex(), s.lr, s.tokens, s.tokens_total, s.samples_digest


def _numbers(events: Iterable[e.Recorded]) -> Numbers:
    found = Numbers()
    for r in events:
        match r.event:
            case e.StepCompleted() as step:
                found.steps[step.step] = _exact(step)
            case e.ValidationCompleted() as validation:
                found.validations[validation.step] = validation.loss.hex()
            case e.RunSucceeded() as end:
                found.final = _contents(Path(end.final_checkpoint))
    return found


def _contents(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file: weights, optimizer, random streams. `.metadata` names its own folder."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    return {f["name"]: f["sha256"] for f in manifest["files"] if f["name"] != ".metadata"}


def _end(events: list[e.Recorded], wanted: Numbers) -> Iterator[str]:
    """It succeeded, and came to the same."""
    if not isinstance(events[-1].event, e.RunSucceeded):
        ends = [r.type for r in events if r.type in ("RunSucceeded", "RunFailed", "RunCancelled")]
        if ends[-1:] != ["RunSucceeded"]:
            yield f"is not succeeded: {events[-1]}"
            return
    found = _numbers(events)
    if found.validations != wanted.validations:
        yield f"validations {found.validations}, undisturbed {wanted.validations}"
    if found.steps.keys() != wanted.steps.keys():
        yield f"has the steps {sorted(found.steps)}"
    if found.final != wanted.final:
        yield "its last checkpoint has other bytes than the undisturbed run's"


def _every_step(events: list[e.Recorded], wanted: Numbers, tally: Tally) -> Iterator[str]:
    """Every step of every attempt, superseded or not."""
    for r in events:
        if isinstance(r.event, e.StepCompleted):
            tally.steps += 1
            if (found := _exact(r.event)) != wanted.steps.get(r.event.step):
                yield f"step {r.event.step}: {found}, undisturbed {wanted.steps.get(r.event.step)}"
        elif isinstance(r.event, e.AnomalyDetected) and r.event.what != _CHECKPOINT_FAILED:
            yield f"step {r.event.step}: {r.event.what} {r.event.detail}"
        elif isinstance(r.event, e.CheckpointRejected):
            yield f"the checkpoint of step {r.event.step} was rejected: {r.event.reason}"


def _attempts(events: list[e.Recorded], homes: list[Home], tally: Tally) -> Iterator[str]:
    """Attempts follow each other, and every line of their journals is in the log once, in order."""
    run_id = events[0].run_id
    if [r.version for r in events] != list(range(1, len(events) + 1)):
        yield "its versions are not 1, 2, 3, …"
    claimed = [r.attempt for r in events if r.type == "AttemptClaimed"]
    tally.attempts += len(claimed)
    if claimed != list(range(1, len(claimed) + 1)):
        yield f"attempts claimed: {claimed}"
    launched = Counter(r.attempt for r in events if r.type == "AttemptLaunched")
    if twice := [number for number, times in launched.items() if times > 1]:
        yield f"attempts {twice} were launched twice"
    over: set[int | None] = set()
    for r in events:
        if isinstance(r.event, _LOST):
            over.add(r.attempt)
        elif r.actor == "trainer" and r.attempt in over:
            yield f"version {r.version} is of attempt {r.attempt}, which had ended"
    ended = 0
    for number in range(1, len(claimed) + 1):
        folders = [a for h in homes if (a := h.attempt(run_id, number)).path.exists()]
        if len(folders) > 1:
            yield f"attempt {number} has {len(folders)} folders"
        lines = journal.read(folders[0].journal, limit=10**9)[0] if folders else []
        ids = [journal.event_id(run_id, number, line.number) for line in lines]
        ingested = [r for r in events if r.attempt == number and r.actor == "trainer"]
        # What a person gave up is no longer read.
        count = len(ingested) if (run_id, number) in tally.given_up else len(ids)
        if [r.event_id for r in ingested] != ids[:count]:
            yield f"attempt {number}: {len(ids)} lines in its journal, {len(ingested)} in the log, or in another order"
        elif [r.event for r in ingested] != [line.event for line in lines[:count]]:
            yield f"attempt {number}: the log says otherwise than its journal"
        if lines:
            if lines[0].occurred_at < ended:
                yield f"attempt {number} began {ended - lines[0].occurred_at} µs before another had ended"
            ended = max(ended, lines[-1].occurred_at)


def _blame(run_id: str, events: list[e.Recorded], tally: Tally) -> None:
    """Lay each attempt that ended without success at the door of the last fault that struck it, and could end it."""
    for r in events:
        if isinstance(r.event, _LOST):
            cause = r.event.cause if isinstance(r.event, e.AttemptFailed) else "lost"
            tally.causes[cause] += 1
            struck = [t.fault for t in tally.touches if (run_id, r.attempt) in t.attempts]
            deadly = [fault for fault in struck if fault not in _SPARE_TRAINING]
            tally.restarts[(deadly or struck or [f"none of these: {cause}"])[-1]] += 1
