"""Drives one attempt: ingests its journal, forwards stop requests, records its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from sftd.daemon.log import of_run
from sftd.daemon.watchdog import Watchdog
from sftd.domain.errors import JournalCorrupt, SftdError, UnknownEvent
from sftd.domain.log import events as e
from sftd.domain.run.failures import Failure, Remains, classify
from sftd.domain.run.state import Run
from sftd.domain.spec.sections import Launch
from sftd.launcher.seam import Attempt
from sftd.operations.context import Context
from sftd.operations.driving import attempts, checkpoints, reduce
from sftd.settings import Settings
from sftd.store.database.engine import Store
from sftd.store.log import positions
from sftd.store.queue.leases import Lease
from sftd.wire.attempt import journal

# Large enough that the commit's wait for the disk does not dominate.
_LINES_PER_TRANSACTION = 2000
# Other writers wait for the end of a transaction.
_LOOKS_PER_TRANSACTION = 100
# A long backlog is ingested over several ticks, so that leases are renewed between them.
_LINES_PER_TICK = 5 * _LINES_PER_TRANSACTION
# An attempt that has not stopped after this time is killed. A stop needs the rest of a step and a checkpoint.
_STOP_SECONDS = 600.0


class Look(msgspec.Struct, frozen=True):
    """The journal lines of an attempt that are not in the log yet, and whether the attempt was alive before they were read."""

    alive: bool
    taken: attempts.Taken


class Supervisor:
    """One attempt under one lease. All methods raise `LeaseLost` once the lease is lost."""

    def __init__(
        self,
        store: Store,
        context: Context,
        settings: Settings,
        lease: Lease,
        attempt: Attempt,
        launched: e.AttemptLaunched | None = None,
    ) -> None:
        """`launched` is recorded before anything else of the attempt."""
        self._store = store
        self._context = context
        self._settings = settings
        self.lease = lease
        self.attempt = attempt
        self._launched = launched
        self._log = of_run(lease.run_id, lease.attempt)
        self._before: dict[int, e.StepCompleted] | None = None
        self._stopping_since: float | None = None
        # Why this daemon ends the attempt.
        self._verdict: Failure | None = None
        self._launch = _launch(attempt)
        self._watchdog = Watchdog(self._launch)
        self._asked_for_stacks: float | None = None
        self._reported: e.JobReported | None = None
        self._stuck: list[int] = []
        # Read at once: a full disk may have room again when the end is recorded.
        self._first_remains: Remains | None = None
        with store.read() as connection:
            self._line, self._offset = positions.journal_cursor(connection, lease.run_id, lease.attempt)

    @property
    def is_recorded(self) -> bool:
        """Whether the log has the attempt's launch."""
        return self._launched is None

    def ingest(self) -> int:
        """Ingest new lines of the journal. Returns their number."""
        if self._launched is not None:
            attempts.launched(self._store, self._context, self.lease, self._launched)
            self._launched = None
        if self._before is None:
            self._before = attempts.steps_before(self._store, self.lease)
        taken = 0
        published = caught_up = False
        while self._verdict is None and taken < _LINES_PER_TICK and not caught_up:
            try:
                lines, offset = self._read(_LINES_PER_TRANSACTION)
                # Lines written since then are for the next tick: otherwise each would get its own transaction, and the
                # other attempts would wait.
                caught_up = len(lines) < _LINES_PER_TRANSACTION
            except (JournalCorrupt, UnknownEvent) as error:
                # A read with a bad line returns nothing. Ingest the lines before it one by one.
                lines, offset = self._lines_before_corruption(error)
            if not lines:
                break
            recorded = attempts.record(self._store, self._context, self.lease, lines, offset, self._before)
            taken += len(lines)
            published = self._took(lines, offset, recorded) or published
        if published:
            collect(self._store, self._context, self.lease.run_id, self.lease)
        return taken

    def look(self) -> Look | None:
        """Read new lines without recording them. The daemon records those of many attempts together, and passes the result to
        `tick`. None if `tick` must ingest by itself."""
        if self._launched is not None or self._before is None or self._verdict is not None:
            return None
        try:
            # Checked before the journal is read, as in `tick`.
            alive = self._is_alive()
            lines, offset = self._read(_LINES_PER_TRANSACTION)
        except (OSError, ValueError, SftdError):
            # `tick` gets the same error and reports it.
            return None
        if len(lines) == _LINES_PER_TRANSACTION:
            return None
        return Look(alive, attempts.Taken(self.lease, lines, offset, self._before))

    def _took(self, lines: list[journal.Line], offset: int, recorded: list[e.Recorded]) -> bool:
        """Note that lines are in the log. Returns whether one publishes a checkpoint."""
        self._line, self._offset = lines[-1].number, offset
        self._watchdog.progressed(
            [line.event.seconds for line in lines if isinstance(line.event, e.StepCompleted)]
        )
        self._asked_for_stacks = None
        for r in recorded:
            if isinstance(r.event, e.AnomalyDetected):
                self._log.warning("anomaly at step %d: %s", r.event.step, r.event.what)
        return any(isinstance(line.event, e.CheckpointPublished) for line in lines)

    def _read(self, limit: int) -> tuple[list[journal.Line], int]:
        lines, offset = journal.read(self.attempt.directory.journal, self._offset, self._line + 1, limit)
        if any(isinstance(line.event, e.CheckpointPublished) for line in lines):
            journal.check_paths(lines, self.attempt.directory.order().checkpoint_dir)
        return lines, offset

    def _lines_before_corruption(self, error: Exception) -> tuple[list[journal.Line], int]:
        try:
            return self._read(limit=1)
        except (JournalCorrupt, UnknownEvent):
            self._log.error("%s", error)
            attempts.reject_journal(
                self._store, self._context, self.lease, f"the journal cannot be read: {error}"
            )
            self._verdict = Failure("crash", f"the journal cannot be read: {error}")
            return [], self._offset

    def backlog(self) -> tuple[int, e.Micros | None]:
        """Number of journal lines that are not in the log yet, and the time of the first."""
        return journal.backlog(self.attempt.directory.journal, self._offset)

    @property
    def is_preemptible(self) -> bool:
        """Whether a run of higher priority may preempt it."""
        return self._launch.preemptible

    def request_stop(self, *, now: bool = False) -> None:
        """Request a checkpoint and an end from the trainer. Kill it if it does not stop in time, or at once with `now`."""
        report = self.attempt.report()
        if now or (report is not None and report.waits):
            if self._stopping_since is None:
                self._stopping_since = time.monotonic()
                self._log.info("killing attempt %d as requested", self.lease.attempt)
            self.attempt.kill()
            return
        since = time.monotonic()
        if self._stopping_since is None:
            self._stopping_since = since
            try:
                self.attempt.directory.request_stop()
            except OSError as error:
                self._log.error("cannot request a stop (%s); killing the attempt", error)
                self.attempt.kill()
            else:
                self._log.info("asked attempt %d to stop", self.lease.attempt)
        elif since - self._stopping_since > _STOP_SECONDS:
            self._log.warning("attempt %d did not stop in time; killing it", self.lease.attempt)
            self.attempt.kill()

    def _is_alive(self) -> bool:
        """Whether the attempt is alive. If not, keeps its remains as they are now."""
        alive = self.attempt.is_alive()
        if not alive and self._first_remains is None:
            self._first_remains = self.attempt.remains()
        return alive

    def tick(self, look: Look | None = None, recorded: list[e.Recorded] | None = None) -> Run | None:
        """Ingest new lines, unless those of `look` are `recorded` already. Finish the attempt if its processes are gone. Returns
        the run then, None while the attempt lives."""
        if look is not None and recorded is not None:
            alive, lines = look.alive, look.taken.lines
            if lines and self._took(lines, look.taken.byte_offset, recorded):
                collect(self._store, self._context, self.lease.run_id, self.lease)
        else:
            # Checked before the last ingest, which so reads everything that the attempt wrote.
            alive = self._is_alive()
            self.ingest()
        self._record_report()
        if alive and self._verdict is None:
            self._watch()
        if self._verdict is not None:
            self.attempt.kill()
            alive = False
        return None if alive else self._finish()

    def _record_report(self) -> None:
        """Record the resource manager's report if it has changed."""
        report = self.attempt.report()
        if report is None or not report.state:
            return
        event = e.JobReported(job=report.job, state=report.state, reason=report.reason, nodes=report.nodes)
        if event != self._reported:
            attempts.job_reported(self._store, self._context, self.lease, event)
            self._reported = event

    def _watch(self) -> None:
        """End an attempt that hangs, after its ranks had time to write their stacks."""
        report = self.attempt.report()
        if report is not None and not report.trains:
            # The job waits for machines, or its state is unknown: silence is normal.
            self._watchdog.progressed([])
            return
        silent = self._watchdog.silent_too_long()
        if silent is None:
            return
        if self._asked_for_stacks is None:
            self._log.warning("nothing recorded for %.0f s; requesting stacks", silent)
            self.attempt.ask_for_stacks()
            self._asked_for_stacks = time.monotonic()
        elif time.monotonic() - self._asked_for_stacks > self.attempt.stacks_seconds:
            median = self._watchdog.median_step
            usual = f"; a step took {median:.3g} s" if median is not None else ", no step was made"
            self._verdict = Failure(
                "hang", f"nothing was recorded for {silent:.0f} s{usual}", self.attempt.stacks()
            )

    def _finish(self) -> Run | None:
        # Ranks may outlive a killed torchrun; two attempts must never write at once.
        if stuck := self.attempt.kill():
            if stuck != self._stuck:
                self._log.error("processes %s do not die; waiting for them", stuck)
                self._stuck = stuck
            return None
        if self.ingest() >= _LINES_PER_TICK:
            return None
        # No attempt is alive, and none can begin while this lease is held.
        checkpoints.sweep(self._store, self.lease.run_id)
        remains = self.attempt.remains()
        if self._first_remains is not None and classify(self._first_remains).cause == "disk full":
            remains = self._first_remains
        exit_code = remains.exit_code
        failure = self._verdict or classify(remains)
        run = attempts.finish(
            self._store,
            self._context,
            self.lease,
            exit_code=exit_code,
            failure=failure,
            lost=failure.cause == "lost"
            or (exit_code is None and not remains.rank_errors and self._verdict is None),
            backoff_seconds=self._settings.backoff_seconds,
            interruption=remains.interruption if self._verdict is None else None,
        )
        self._log.info(
            "attempt %d ended, run is %s%s",
            self.lease.attempt,
            run.status,
            f" ({run.cause}: {run.message})" if run.cause else "",
        )
        collect(self._store, self._context, run.run_id)
        return run


def take_in(
    store: Store, context: Context, supervisors: Sequence[Supervisor], until: float
) -> dict[str, tuple[Look, list[e.Recorded]]]:
    """Record new journal lines of as many supervisors as possible until `until` (`time.monotonic`), in one transaction. Returns
    the arguments of each supervisor's `tick`, by run."""
    looks: dict[str, Look] = {}
    for supervisor in supervisors:
        if time.monotonic() > until or len(looks) == _LOOKS_PER_TRANSACTION:
            break
        if (look := supervisor.look()) is not None:
            looks[supervisor.lease.run_id] = look
    try:
        recorded = attempts.record_all(store, context, [look.taken for look in looks.values()])
    except (ValueError, SftdError):
        # One attempt's error. Without this result, each tick ingests by itself and handles its own error.
        return {}
    return {run_id: (look, new) for (run_id, look), new in zip(looks.items(), recorded, strict=True)}


def _launch(attempt: Attempt) -> Launch:
    try:
        return attempt.directory.order().spec.launch
    except (OSError, ValueError):
        # Nothing was started.
        return Launch()


def collect(store: Store, context: Context, run_id: str, lease: Lease | None = None) -> None:
    """Delete unprotected checkpoints. After the run's success (without `lease`), also reduce others to their weights."""
    for deleted in checkpoints.collect(store, context, run_id, lease):
        of_run(run_id).info("deleted the checkpoint of step %d (%s)", deleted.step, deleted.reason)
    if lease is not None:
        return
    try:
        for reduced in reduce.reduce(store, context, run_id):
            of_run(run_id).info("reduced the checkpoint of step %d to its weights", reduced.step)
    except OSError as error:
        # This does not change the run's success.
        of_run(run_id).warning("checkpoints are not reduced to weights (`sftd gc` tries again): %s", error)
