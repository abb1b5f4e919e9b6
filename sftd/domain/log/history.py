"""A run's history: parse a moment, select the events up to it, and list the milestones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from sftd.domain.errors import Problem, Refused, quote
from sftd.domain.log import events as e
from sftd.domain.log.codec import json_float
from sftd.domain.log.timeline import Timeline

WHERE = "--until"
_FORMS = "write step:300, v120, 2026-01-31T09:30 or -2h"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
# Digits are limited because Python refuses to convert numbers with thousands of digits.
_AGO = re.compile(r"-(?:\d{1,9}[smhdw]){1,9}")
_PART = re.compile(r"(\d+)([smhdw])")


class AtStep(msgspec.Struct, frozen=True):
    """The completion of a step of the timeline; 0 is the state before the first step."""

    step: int


class AtVersion(msgspec.Struct, frozen=True):
    """The moment at which the stream had this number of events."""

    version: int


class AtTime(msgspec.Struct, frozen=True):
    """A time, in µs since the epoch."""

    micros: e.Micros


Moment = AtStep | AtVersion | AtTime


def parse_moment(text: str, now: e.Micros) -> Moment:
    """Parse `300`, `step:300`, `v120`, an ISO time (local without an offset), or `-2h` or `-1h30m` (before `now`). Raises
    `Refused` for ambiguous or unknown forms."""
    if match := re.fullmatch(r"(?:step:)?(\d{1,18})", text):
        return AtStep(int(match[1]))
    if match := re.fullmatch(r"v(?:ersion:)?(\d{1,18})", text):
        return AtVersion(int(match[1]))
    if _AGO.fullmatch(text):
        seconds = sum(int(count) * _UNITS[unit] for count, unit in _PART.findall(text))
        return AtTime(now - seconds * 1_000_000)
    if re.fullmatch(r"-\d+", text):
        raise _refused(
            text, "could be steps or any unit of time", f"write {text}s, {text}m, {text}h or step:N"
        )
    if re.fullmatch(r"(?:\d+[smhdw])+", text):
        raise _refused(
            text, "could count back from now or from the start", f"write -{text} to count back from now"
        )
    if re.fullmatch(r"\d\d?:\d\d(?::\d\d)?", text):
        raise _refused(text, "has no date", f"add the date, as in 2026-01-31T{text.zfill(5)}")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise _refused(
            text, "could be the start or the end of the day", f"write {text}T00:00 or {text}T23:59"
        )
    try:
        when = datetime.fromisoformat(text)
        return AtTime(round(when.astimezone().timestamp() * 1_000_000))
    except (ValueError, OverflowError):
        raise _refused(text, "is not a step, a version or a time", _FORMS) from None


def _refused(text: str, what: str, fix: str) -> Refused:
    return Refused(Problem(WHERE, f"{quote(text)} {what}", fix))


def up_to(recorded: Sequence[e.Recorded], moment: Moment) -> list[e.Recorded]:
    """The events of a stream up to a moment. Folding them gives the run's state at that moment. Raises `Refused`.

    If several attempts computed a step, the timeline's record of it counts. The events of the step that follow it directly
    (its validation, its checkpoint) are included. For a time, `occurred_at` decides, not the order in the log.
    """
    match moment:
        case AtVersion(version):
            if not 1 <= version <= len(recorded):
                what = f"v{version} is not in the log"
                raise Refused(Problem(WHERE, what, f"the versions are v1 to v{len(recorded)}"))
            return list(recorded[:version])
        case AtTime(micros):
            return [r for r in recorded if r.occurred_at <= micros]
        case AtStep(step):
            return list(recorded[: _end_of_step(recorded, step)])


def _end_of_step(recorded: Sequence[e.Recorded], step: int) -> int:
    timeline = Timeline(r.event for r in recorded)
    steps = [n for n, r in enumerate(recorded) if isinstance(r.event, e.StepCompleted)]
    known = timeline.recorded
    first, last = min((s.first for s in known), default=0), max((s.last for s in known), default=0)
    if not known and step == timeline.from_step:
        return len(recorded)
    # The state after step `first - 1` is the state before the first step.
    is_start = step == first - 1
    place = timeline.place(first if is_start else step)
    if place is None:
        have = f"the log has the steps {first} to {last}" if known else "the log has no step yet"
        raise Refused(Problem(WHERE, f"step {step} is not in the log", have))
    if is_start:
        return steps[place]
    end = steps[place] + 1
    while end < len(recorded) and _belongs(recorded[end].event, step):
        end += 1
    return end


def _belongs(event: e.Event, step: int) -> bool:
    kinds = (
        e.ValidationCompleted,
        e.SampleGenerated,
        e.StoppedEarly,
        e.CheckpointStarted,
        e.CheckpointPublished,
        e.AnomalyDetected,
    )
    return isinstance(event, kinds) and event.step == step


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive steps of one attempt, with their results. `redone`: the log already had these steps with the same samples.
    `versions` and `times` are those of the first and the last step."""

    attempt: int | None
    first: int
    last: int
    first_loss: float | str
    last_loss: float | str
    redone: bool
    versions: tuple[int, int]
    times: tuple[e.Micros, e.Micros]
    validations: tuple[tuple[int, float | str], ...] = ()
    checkpoints: tuple[int, ...] = ()
    anomalies: tuple[tuple[int, str], ...] = ()


# `Steps` covers these events of an attempt.
_WITHIN = (e.AttemptLaunched, e.AttemptAdopted, e.ModelLoaded)
# These are details, but a fork is a milestone of its parent.
_FORKS = (e.CheckpointPinned, e.CheckpointUnpinned)


def milestones(recorded: Sequence[e.Recorded]) -> Iterator[e.Recorded | Steps]:
    """Milestones in order: single events, and the steps between them as `Steps`."""
    steps: Steps | None = None
    timeline = Timeline()
    replace = msgspec.structs.replace
    for r in recorded:
        event = r.event
        redone = isinstance(event, e.StepCompleted) and timeline.before(event.step) is not None
        timeline.add(event)
        if isinstance(event, _WITHIN) or (event.severity == "detail" and not isinstance(event, _FORKS)):
            continue
        if isinstance(event, e.StepCompleted):
            if steps is not None and (steps.last + 1, steps.attempt, steps.redone) == (
                event.step,
                r.attempt,
                redone,
            ):
                steps = replace(
                    steps,
                    last=event.step,
                    last_loss=json_float(event.loss),
                    versions=(steps.versions[0], r.version),
                    times=(steps.times[0], r.occurred_at),
                )
                continue
            if steps is not None:
                yield steps
            steps = _begin(r, event, redone=redone)
        elif steps is not None and isinstance(event, e.ValidationCompleted):
            found = (*steps.validations, (event.step, json_float(event.loss)))
            steps = replace(steps, validations=found)
        elif steps is not None and isinstance(event, e.CheckpointPublished):
            steps = replace(steps, checkpoints=(*steps.checkpoints, event.step))
        elif steps is not None and isinstance(event, e.AnomalyDetected):
            steps = replace(steps, anomalies=(*steps.anomalies, (event.step, event.what)))
        else:
            if steps is not None:
                yield steps
            steps = None
            yield r
    if steps is not None:
        yield steps


def _begin(r: e.Recorded, event: e.StepCompleted, *, redone: bool) -> Steps:
    loss = json_float(event.loss)
    return Steps(
        attempt=r.attempt,
        first=event.step,
        last=event.step,
        first_loss=loss,
        last_loss=loss,
        redone=redone,
        versions=(r.version, r.version),
        times=(r.occurred_at, r.occurred_at),
    )
