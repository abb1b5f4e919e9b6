"""Who may write what: one daemon for each attempt, whatever the clocks of the hosts say and however many are at it."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from sftd.domain.errors import LeaseLost, Refused
from sftd.domain.log import events as e
from sftd.domain.run.failures import Failure
from sftd.operations.commands import lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.operations.driving.attempts import Claimed
from sftd.operations.driving.turns import NO_LIMITS, anything_left
from sftd.store.database.engine import Store
from sftd.store.database.tables import events
from sftd.store.log import event_store
from sftd.store.queue import leases
from sftd.store.queue import order as queue_order
from sftd.store.queue.leases import Lease
from sftd.wire.preflight import Preflight
from tests.builders.log.attempts import lines
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC
from tests.builders.patience import PATIENCE

HOUR = 3_600_000_000
FAILURE = Failure("killed", "boom")


def skewed(by: int) -> Context:
    """A host whose clock is wrong by a number of µs."""
    return Context(actor="skewed", now=lambda: time.time_ns() // 1000 + by)


def submit(log: Store, context: Context = CONTEXT) -> str:
    return submit_all(log, context, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ada")[0]


def claim(log: Store, context: Context = CONTEXT, daemon: str = "d") -> Claimed | None:
    return attempts.claim(log, context, daemon=daemon, host="host", fits=lambda run: True, lease_micros=LEASE)


def taken_over(log: Store) -> Lease:
    """A lease that another daemon has taken over."""
    submit(log)
    found = claim(log)
    assert found is not None
    attempts.adopt(log, CONTEXT, found.lease, e.AttemptAdopted(daemon="other", host="host", pid=1), LEASE)
    return found.lease


LAUNCHED = e.AttemptLaunched(pid=1, create_time=1.0, host="h", directory="d", argv=[], devices=[])
WRITES: dict[str, Callable[[Store, Lease], object]] = {
    "launched": lambda log, lease: attempts.launched(log, CONTEXT, lease, LAUNCHED),
    "sampled": lambda log, lease: attempts.sampled(
        log,
        CONTEXT,
        lease,
        e.SystemSampled(host="h", cpu_percent=1.0, memory_used_bytes=1, memory_total_bytes=2),
    ),
    "job_reported": lambda log, lease: attempts.job_reported(
        log, CONTEXT, lease, e.JobReported(job="1", state="RUNNING")
    ),
    "record": lambda log, lease: attempts.record(log, CONTEXT, lease, lines(step(1)), 10, {}),
    "reject_journal": lambda log, lease: attempts.reject_journal(log, CONTEXT, lease, "torn"),
    "finish": lambda log, lease: attempts.finish(
        log, CONTEXT, lease, exit_code=1, failure=FAILURE, lost=False, backoff_seconds=1.0
    ),
    "adopt": lambda log, lease: attempts.adopt(
        log, CONTEXT, lease, e.AttemptAdopted(daemon="d", host="host", pid=1), LEASE
    ),
}


def test_every_write_under_a_lease_is_among_these() -> None:
    leased = {
        name
        for name, function in inspect.getmembers(attempts, inspect.isfunction)
        if function.__module__ == attempts.__name__
        and not name.startswith("_")
        and {"context", "store"} < set(parameters := inspect.signature(function).parameters)
        and {"lease", "old"} & set(parameters)
    }
    assert leased == WRITES.keys()


@pytest.mark.parametrize("write", WRITES)
def test_a_daemon_that_wakes_up_writes_nothing_under_the_lease_that_it_lost(log: Store, write: str) -> None:
    lease = taken_over(log)
    with log.read() as connection:
        before = event_store.last_position(connection), leases.leases(connection)
    with pytest.raises(LeaseLost):
        WRITES[write](log, lease)
    assert attempts.renew(log, CONTEXT, [lease], LEASE) == [lease]
    with log.read() as connection:
        assert (event_store.last_position(connection), leases.leases(connection)) == before


def test_a_launch_whose_answer_was_lost_is_recorded_once(log: Store) -> None:
    """The server committed and went away before it could say so: the daemon tries again."""
    run_id = submit(log)
    found = claim(log)
    assert found is not None
    for _ in range(2):
        attempts.launched(log, CONTEXT, found.lease, LAUNCHED)
    with log.read() as connection:
        launches = event_store.read_types(connection, [run_id], ("AttemptLaunched",))
    assert [r.attempt for r in launches] == [1]


def test_the_launch_of_each_attempt_is_recorded(log: Store) -> None:
    run_id = submit(log)
    for _ in range(3):
        found = claim(log)
        assert found is not None
        attempts.launched(log, CONTEXT, found.lease, LAUNCHED)
        attempts.record(log, CONTEXT, found.lease, lines(step(found.lease.attempt)), 10, {})
        attempts.finish(
            log, CONTEXT, found.lease, exit_code=1, failure=FAILURE, lost=False, backoff_seconds=1e-6
        )
    with log.read() as connection:
        launches = event_store.read_types(connection, [run_id], ("AttemptLaunched",))
    assert [r.attempt for r in launches] == [1, 2, 3]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wrong_clock_neither_shortens_a_lease_nor_makes_it_longer(log: Store, hours: int) -> None:
    """On a server. A SQLite file has one host, and its clock is the clock."""
    context = skewed(hours * HOUR)
    submit(log, context)
    found = claim(log, context)
    assert found is not None
    attempts.renew(log, context, [found.lease], LEASE)
    with log.read() as connection:
        (lease,) = leases.leases(connection)
    expected = CONTEXT.now() + LEASE
    if log.engine.dialect.name == "sqlite":
        expected += hours * HOUR
    assert abs(lease.expires_at - expected) < LEASE


def test_a_clock_that_is_fast_does_not_take_a_living_lease(log: Store) -> None:
    submit(log)
    found = claim(log)
    assert found is not None
    fast = skewed(HOUR)
    if log.engine.dialect.name == "sqlite":
        # One host: its clock was set, and by it the lease has expired.
        assert not anything_left(log, fast, lambda demand: True, NO_LIMITS)
        return
    assert anything_left(log, fast, lambda demand: True, NO_LIMITS)
    with pytest.raises(Refused, match="living daemon"):
        lifecycle.abandon(log, fast, found.run.run_id, "ada")
    assert claim(log, fast, "other") is None
    assert len(attempts.record(log, CONTEXT, found.lease, lines(step(1)), 10, {})) == 1


def test_a_lease_that_ran_out_is_given_up_by_a_host_whose_clock_is_slow(log: Store) -> None:
    submit(log)
    found = claim(log)
    assert found is not None
    with log.write(appends=False) as tx:
        leases.renew(tx, [found.lease.token], tx.now(CONTEXT.now()) - 1)
    context = skewed(-HOUR) if log.engine.dialect.name == "postgresql" else CONTEXT
    assert lifecycle.abandon(log, context, found.run.run_id, "ada").run.status == "cancelled"


def test_what_a_fast_clock_queues_starts_at_once(log: Store) -> None:
    """And its back-off lasts as long as it says."""
    # A SQLite file has one host, and one clock.
    fast = skewed(HOUR) if log.engine.dialect.name == "postgresql" else CONTEXT
    run_id = submit(log, fast)
    found = claim(log)
    assert found is not None
    attempts.finish(log, fast, found.lease, exit_code=1, failure=FAILURE, lost=False, backoff_seconds=60.0)
    assert claim(log) is None, "it backs off"
    with log.read() as connection:
        assert queue_order.waiting(connection)[0].not_before < CONTEXT.now() + HOUR // 2
    lifecycle.cancel(log, CONTEXT, run_id, "ada")
    lifecycle.resume(log, fast, run_id, "ada")
    assert claim(log) is not None


CLIENTS, RUNS_OF_EACH, DAEMONS = 8, 6, 4


def test_many_submit_and_many_claim_and_each_run_starts_once_and_in_its_turn(log: Store) -> None:
    total = CLIENTS * RUNS_OF_EACH
    submitted = threading.Semaphore(0)
    barrier = threading.Barrier(CLIENTS + DAEMONS)

    def client(_number: int) -> list[str]:
        barrier.wait()
        mine = []
        for _ in range(RUNS_OF_EACH):
            mine.append(submit(log))
            submitted.release()
        return mine

    def daemon(number: int) -> list[str]:
        barrier.wait()
        mine = []
        for _ in range(total // DAEMONS):
            assert submitted.acquire(timeout=PATIENCE)
            found = claim(log, daemon=f"daemon-{number}")
            assert found is not None, "a run waits, and nobody else may have it"
            mine.append(found.lease.run_id)
        return mine

    with ThreadPoolExecutor(CLIENTS + DAEMONS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        daemons = [pool.submit(daemon, number) for number in range(DAEMONS)]
        wanted = [run_id for future in clients for run_id in future.result()]
        started = [run_id for future in daemons for run_id in future.result()]
    assert sorted(started) == sorted(wanted)
    with log.read() as connection:
        rows = connection.execute(sa.select(events.c.type, events.c.run_id).order_by(events.c.position)).all()
        assert len({lease.token for lease in leases.leases(connection)}) == total
    order = {
        name: [row.run_id for row in rows if row.type == name] for name in ("RunSubmitted", "AttemptClaimed")
    }
    assert order["AttemptClaimed"] == order["RunSubmitted"], "first come, first served"
