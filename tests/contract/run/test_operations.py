"""Operations on a real database: leases, giving up, ingesting once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sftd import settings
from sftd.daemon.supervisor import Supervisor
from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.errors import LeaseLost, Refused
from sftd.domain.log import events as e
from sftd.domain.run.failures import Failure
from sftd.launcher.local import LocalAttempt
from sftd.operations.commands import lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts, checkpoints
from sftd.operations.driving.attempts import Claimed
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.queue import order
from sftd.store.queue.leases import Lease
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.journal import JournalWriter, event_id
from sftd.wire.preflight import Preflight
from tests.builders.log.attempts import lines
from tests.builders.log.clock import Clock
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC


def claimed(log: Store, clock: Clock, daemon: str = "daemon-1") -> Claimed:
    submit_all(log, clock.context, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")
    found = attempts.claim(
        log, clock.context, daemon=daemon, host="host", fits=lambda run: True, lease_micros=LEASE
    )
    assert found is not None
    return found


def test_the_chat_template_of_the_data_is_in_the_log(log: Store, clock: Clock) -> None:
    plain = Preflight(SHAPE, FACTS, None, 3, [])
    template = ChatTemplate(name="short", date="2025-01-02", arguments={"loud": True})
    for found, wanted in ((plain, None), (msgspec.structs.replace(plain, template=template), template)):
        run_id = submit_all(log, clock.context, [Wish(SPEC, found)], "ada")[0]
        assert checkpoints.chat_template(log, run_id) == wanted


def test_lines_are_ingested_once(log: Store, clock: Clock) -> None:
    lease = claimed(log, clock).lease
    first = attempts.record(log, clock.context, lease, lines(step(1), step(2)), 20, {})
    again = attempts.record(log, clock.context, lease, lines(step(1), step(2), step(3)), 30, {})
    assert [len(first), len(again)] == [2, 1]


def test_a_step_done_again_differently_is_an_anomaly(log: Store, clock: Clock) -> None:
    first = claimed(log, clock)
    attempts.record(log, clock.context, first.lease, lines(step(1), step(2)), 20, {})
    failure = Failure("killed", "boom")
    attempts.finish(
        log, clock.context, first.lease, exit_code=1, failure=failure, lost=False, backoff_seconds=1.0
    )
    clock.time += 60_000_000
    second = attempts.claim(
        log, clock.context, daemon="daemon-1", host="host", fits=lambda run: True, lease_micros=LEASE
    )
    assert second is not None
    before = attempts.steps_before(log, second.lease)
    assert sorted(before) == [1, 2]
    recorded = attempts.record(
        log, clock.context, second.lease, lines(step(1), step(2, loss=1.5)), 20, before
    )
    assert [type(r.event).__name__ for r in recorded] == ["StepCompleted", "StepCompleted", "AnomalyDetected"]
    assert recorded[2].causation_id == recorded[1].event_id


def test_every_write_under_a_lost_lease_is_refused(log: Store, clock: Clock) -> None:
    lease = claimed(log, clock).lease
    adopted = e.AttemptAdopted(daemon="daemon-2", host="host", pid=1)
    mine = attempts.adopt(log, clock.context, lease, adopted, LEASE)
    with pytest.raises(LeaseLost):
        attempts.record(log, clock.context, lease, lines(step(1)), 10, {})
    with pytest.raises(LeaseLost):
        attempts.adopt(log, clock.context, lease, adopted, LEASE)
    assert attempts.renew(log, clock.context, [lease, mine], LEASE) == [lease]
    assert len(attempts.record(log, clock.context, mine, lines(step(1)), 10, {})) == 1


def test_a_run_is_given_up_only_when_its_daemon_is_silent(log: Store, clock: Clock) -> None:
    found = claimed(log, clock)
    with pytest.raises(Refused, match="living daemon"):
        lifecycle.abandon(log, clock.context, found.run.run_id, "ada")
    clock.time += LEASE + 1
    assert lifecycle.abandon(log, clock.context, found.run.run_id, "ada").run.status == "cancelled"
    with pytest.raises(LeaseLost):
        attempts.record(log, clock.context, found.lease, lines(step(1)), 10, {})
    assert lifecycle.resume(log, clock.context, found.run.run_id, "ada").status == "queued"


def test_a_large_run_is_not_overtaken(log: Store, clock: Clock) -> None:
    first = claimed(log, clock).run.run_id
    submit_all(log, clock.context, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")
    clock.time += 1
    submit_all(log, clock.context, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")
    with log.read() as connection:
        large, small = (entry.run_id for entry in order.waiting(connection))
    assert first not in (large, small)

    def claim(busy: bool | None) -> Claimed | None:
        return attempts.claim(
            log,
            clock.context,
            daemon="d",
            host="h",
            fits=lambda run: busy if run.run_id == large else True,
            lease_micros=LEASE,
        )

    assert claim(False) is None, "a run that waits for devices keeps its turn"
    found = claim(None)
    assert found is not None, "one that can never start here does not hold up the others"
    assert found.run.run_id == small


def test_a_trainer_that_goes_on_writing_does_not_hold_up_the_daemon(
    log: Store,
    clock: Clock,
    clean_environment: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is written while lines are recorded is for the next tick: other attempts wait for theirs."""
    lease = claimed(log, clock).lease
    attempt = LocalAttempt(AttemptDir(tmp_path), None, lease.token)
    supervisor = Supervisor(log, clock.context, settings.read(), lease, attempt)
    writer = JournalWriter(attempt.directory.journal)
    writer.append(step(1))
    record = attempts.record

    def record_while_writing(*arguments: Any) -> list[e.Recorded]:
        recorded = record(*arguments)
        writer.append(step(recorded[-1].version))
        return recorded

    monkeypatch.setattr(attempts, "record", record_while_writing)
    assert [supervisor.ingest() for _ in range(3)] == [1, 1, 1]
    writer.close()


def test_each_line_of_each_journal_is_in_the_log_once_whoever_reads_it(
    log: Store, clock: Clock, clean_environment: dict[str, Any], tmp_path: Path
) -> None:
    """A daemon takes in a part, the next one continues after it: lines that were torn then, and a second attempt's journal, whose
    numbers begin with 1 again."""
    first = claimed(log, clock)
    lease, run_id = first.lease, first.run.run_id

    def take_in(lease: Lease) -> None:
        attempt = LocalAttempt(AttemptDir(tmp_path / str(lease.attempt)), None, lease.token)
        Supervisor(log, clock.context, settings.read(), lease, attempt).ingest()

    def write(number: int, *steps: e.StepCompleted) -> Path:
        AttemptDir(tmp_path / str(number)).path.mkdir(exist_ok=True)
        writer = JournalWriter(AttemptDir(tmp_path / str(number)).journal)
        for event in steps:
            writer.append(event)
        writer.close()
        return AttemptDir(tmp_path / str(number)).journal

    journal = write(1, step(1), step(2), step(3), step(4))
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-10])
    take_in(lease)
    journal.write_bytes(whole)
    take_in(lease)
    take_in(lease)
    failure = Failure("killed", "boom")
    attempts.finish(log, clock.context, lease, exit_code=1, failure=failure, lost=False, backoff_seconds=1.0)
    clock.time += 60_000_000
    second = attempts.claim(
        log, clock.context, daemon="daemon-2", host="host", fits=lambda run: True, lease_micros=LEASE
    )
    assert second is not None
    write(2, step(1), step(2))
    take_in(second.lease)
    with log.read() as connection:
        types = ("StepCompleted", "AnomalyDetected")
        recorded = list(event_store.read_stream(connection, run_id, types=types))
    assert [(r.attempt, r.event.step) for r in recorded if isinstance(r.event, e.StepCompleted)] == [
        *((1, n) for n in (1, 2, 3, 4)),
        *((2, n) for n in (1, 2)),
    ]
    lines = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)]
    assert [r.event_id for r in recorded] == [event_id(run_id, *line) for line in lines]
