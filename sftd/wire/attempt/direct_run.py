"""The folder of a run that was trained directly, without a daemon, and its history.

<run>/run.json         the submission: the spec, and what submit found in the files
      attempt-0001/    as under the daemon (see `attempt_dir`); the trainer itself writes `exit` and `stop`
      checkpoints/     step-00000012/ …
      lock             every process of a running attempt holds it

`read_history` converts the folder to the events that a daemon would have recorded. The trainer continues from them, and
`sftd import` copies them into the event store. Each event's id is a function of the folder's contents, and a folder
only grows, so an earlier history is a prefix of a later one.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sftd.domain.errors import JournalCorrupt, Problem, Refused
from sftd.domain.log import codec
from sftd.domain.log import events as e
from sftd.domain.repro.steps import steps_to_redo
from sftd.domain.run import decisions, trajectory
from sftd.domain.run.exactness import compare_with_log
from sftd.domain.run.failures import Failure, classify
from sftd.domain.run.fold import evolve
from sftd.domain.run.ids import is_run_id
from sftd.domain.run.state import Run
from sftd.domain.spec.spec import spec_digest
from sftd.wire.attempt import journal
from sftd.wire.attempt.directory import (
    AttemptDir,
    Order,
    ProcessFile,
    attempt_dir,
    make_private,
    write_atomic,
)
from sftd.wire.attempt.remains import find_remains

DAEMON = "direct"


class DirectSubmission(msgspec.Struct, frozen=True, kw_only=True):
    """run.json: the run's id, and its first event as schema version `v` wrote it."""

    run_id: str
    occurred_at: e.Micros
    v: int
    event: dict[str, Any]

    @classmethod
    def of(cls, run_id: str, occurred_at: e.Micros, event: e.RunSubmitted) -> DirectSubmission:
        """The contents of the file."""
        return cls(
            run_id=run_id, occurred_at=occurred_at, v=event.schema_version, event=msgspec.to_builtins(event)
        )

    def submitted(self) -> e.RunSubmitted:
        """The event. Raises `UnknownEvent` when a newer sftd wrote it."""
        event = codec.decode(e.RunSubmitted.__name__, self.v, msgspec.json.encode(self.event))
        assert isinstance(event, e.RunSubmitted)
        return event


class DirectRun:
    """The folder of a run that was trained directly."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.submission_file = self.path / "run.json"
        self.lock_file = self.path / "lock"
        self.checkpoint_dir = self.path / "checkpoints"

    def submission(self) -> DirectSubmission | None:
        """The submission, or None in a new folder. Raises `Refused` when the file cannot be read."""
        try:
            found = msgspec.json.decode(self.submission_file.read_bytes(), type=DirectSubmission)
            if not is_run_id(found.run_id):
                # The id becomes part of a path.
                raise msgspec.ValidationError(f"{found.run_id!r} is not a run id")
            return found
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise Refused(
                Problem(str(self.submission_file), f"cannot be read: {error}", "put the file back as it was")
            ) from None

    def write_submission(self, submission: DirectSubmission) -> None:
        """Write run.json, which begins the run."""
        write_atomic(self.submission_file, msgspec.json.format(msgspec.json.encode(submission), indent=2))

    def attempt(self, number: int) -> AttemptDir:
        """Folder of attempt `number` (from 1)."""
        return attempt_dir(self.path, number)

    def attempts(self) -> int:
        """Number of attempts that have begun."""
        number = 0
        while self.attempt(number + 1).order_file.is_file():
            number += 1
        return number

    def hold(self) -> Hold:
        """Keep other processes from starting or importing this run until this process ends or closes the hold.

        Raises `Refused` while a process of an attempt runs, on this host or on another that shares the file system.
        """
        make_private(self.path)
        fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise self._in_use() from None
        return Hold(self, fd)

    def share_hold(self) -> Hold:
        """Share the hold of the attempt that its holder is starting. Raises `Refused`."""
        fd = os.open(self.lock_file, os.O_RDWR | os.O_CLOEXEC)
        hold = Hold(self, fd)
        hold.share()
        return hold

    def _in_use(self) -> Refused:
        number = self.attempts()
        process = self.attempt(number).process() if number else None
        who = f" (attempt {number} has pid {process.pid} on {process.host})" if process else ""
        return Refused(
            Problem(
                str(self.path),
                f"is being trained or imported at this moment{who}",
                "wait until it has ended, or end it: Ctrl-C, or SIGTERM to torchrun",
            )
        )


class Hold:
    """A lock on a run's folder."""

    def __init__(self, run: DirectRun, fd: int) -> None:
        self._run = run
        self._fd = fd

    def share(self) -> None:
        """Let other processes of the attempt share the lock. Raises `Refused` when another start has taken it in between."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._run._in_use() from None

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)


@dataclass
class DirectHistory:
    """The events of a run in order, and the state that they fold to."""

    run: Run
    events: list[e.NewEvent] = field(default_factory=list)

    def add(self, new: e.NewEvent) -> None:
        """Append an event."""
        self.events.append(new)
        self.run = take(self.run, new.event, new.occurred_at, new.attempt)


def take(run: Run, event: e.Event, occurred_at: e.Micros, attempt: int | None) -> Run:
    """The run after one more event, which no log has yet."""
    version = run.version + 1
    recorded = e.Recorded(
        position=version,
        event_id="",
        run_id=run.run_id,
        version=version,
        type=type(event).__name__,
        schema_version=event.schema_version,
        occurred_at=occurred_at,
        recorded_at=occurred_at,
        attempt=attempt,
        actor="",
        causation_id=None,
        event=event,
    )
    return evolve(run, recorded)


def read_history(run: DirectRun, submission: DirectSubmission, *, living: int | None = None) -> DirectHistory:
    """The events of the folder. The end of each attempt is inferred from its files, except for attempt `living`.
    Raises `Refused` when the folder cannot be read, `UnknownEvent` when a newer sftd wrote it."""
    submitted = submission.submitted()
    history = DirectHistory(Run(submission.run_id))
    history.add(
        e.NewEvent(
            event=submitted,
            event_id=journal.event_id(submission.run_id, 0, "submitted"),
            occurred_at=submission.occurred_at,
            actor=f"{DAEMON}:{submitted.user}",
        )
    )
    for number in range(1, run.attempts() + 1):
        _Attempt(run.attempt(number), number, history, submitted.user).read(ended=number != living)
    return history


class _Attempt:
    """One attempt's part of the history."""

    def __init__(
        self,
        directory: AttemptDir,
        number: int,
        history: DirectHistory,
        user: str,
    ) -> None:
        self._directory = directory
        self._number = number
        self._history = history
        self._user = user

    def read(self, *, ended: bool) -> None:
        order, process = self._order(), self._directory.process()
        run = self._history.run
        at = process.started_at if process else run.updated_at
        changes = trajectory.changes(run.spec, order.spec)
        if changes:
            resumed = e.ResumeRequested(
                by=self._user,
                changes=changes,
                spec=msgspec.to_builtins(order.spec),
                spec_digest=spec_digest(order.spec),
                planned_steps=order.planned_steps,
            )
            self._add(resumed, "resumed", at, attempt=None)
        elif self._number > 1:
            self._add(e.ResumeRequested(by=self._user), "resumed", at, attempt=None)
        self._add(
            e.AttemptClaimed(
                daemon=DAEMON,
                host=process.host if process else "",
                from_step=_from_step(run, order),
                checkpoint=order.checkpoint,
            ),
            "claimed",
            at,
        )
        if process is not None:
            self._add(self._launched(process), "launched", at)
        failure = self._read_journal()
        if ended:
            self._end(failure)

    def _order(self) -> Order:
        try:
            return self._directory.order()
        except (OSError, msgspec.MsgspecError) as error:
            where = str(self._directory.order_file)
            raise Refused(Problem(where, f"cannot be read: {error}", "put the file back as it was")) from None

    def _launched(self, process: ProcessFile) -> e.AttemptLaunched:
        return e.AttemptLaunched(
            pid=process.pid,
            create_time=process.create_time,
            host=process.host,
            directory=str(self._directory.path),
            argv=process.argv,
            devices=process.devices,
        )

    def _read_journal(self) -> Failure | None:
        """Add the journal's lines to the history. Returns the failure if a line cannot be read."""
        log = steps_to_redo(n.event for n in self._history.events)
        number, offset, limit = 0, 0, 1000
        while True:
            try:
                lines, offset = journal.read(self._directory.journal, offset, number + 1, limit)
            except JournalCorrupt as error:
                if limit > 1:
                    # The failed read dropped the lines before the bad one: read them one by one.
                    limit = 1
                    continue
                what = f"the journal cannot be read: {error}"
                self._add(e.AnomalyDetected(step=0, what=what), "unreadable", self._history.run.updated_at)
                return Failure("crash", what)
            if not lines:
                return None
            number = lines[-1].number
            for line in lines:
                self._take_line(line, log)

    def _take_line(self, line: journal.Line, log: dict[int, e.StepCompleted]) -> None:
        line_id = journal.event_id(self._history.run.run_id, self._number, line.number)
        self._history.add(
            e.NewEvent(
                event=line.event,
                event_id=line_id,
                occurred_at=line.occurred_at,
                actor="trainer",
                attempt=self._number,
            )
        )
        redone = compare_with_log(log, self._history.run, line.event)
        if redone is not None and (anomaly := redone.anomaly):
            self._add(anomaly, f"{line.number}/anomaly", line.occurred_at, causation_id=line_id)

    def _end(self, unreadable: Failure | None) -> None:
        remains = find_remains(self._directory)
        decided = decisions.end_direct_attempt(
            self._history.run,
            exit_code=remains.exit_code,
            failure=unreadable or classify(remains),
            lost=remains.exit_code is None and not remains.rank_errors and unreadable is None,
            stopped_by=self._user if self._directory.stop_requested() else None,
        )
        for event in decided:
            self._add(event, type(event).__name__, self._history.run.updated_at)

    def _add(self, event: e.Event, name: str, at: e.Micros, **fields: Any) -> None:
        self._history.add(
            e.NewEvent(
                event=event,
                event_id=journal.event_id(self._history.run.run_id, self._number, name),
                occurred_at=at,
                actor=f"{DAEMON}:{self._user}",
                **{"attempt": self._number} | fields,
            )
        )


def _from_step(run: Run, order: Order) -> int:
    if order.checkpoint is None:
        return 0
    known = next((c.step for c in run.checkpoints if c.path == order.checkpoint), None)
    if known is not None:
        return known
    # A later attempt rejected the checkpoint or retention deleted it. The folder's name still has the step.
    digits = Path(order.checkpoint).name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
