"""What boards, ledgers, copies and leases ask of the database: a bounded number of rows, in order, and of the right run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import sqlalchemy as sa

from sftd.domain.compare.curves import RunCurves
from sftd.domain.errors import LeaseLost, ViewDamaged
from sftd.domain.log.events import Recorded
from sftd.domain.run.goodput import Fold
from sftd.store.database import copying
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.store.log import curves, event_store, goodput
from sftd.store.queries import board
from sftd.store.queue import leases, named_leases
from tests.builders.log.histories import (
    FAILED,
    NOON,
    SECOND,
    SUCCEEDED,
    append,
    claimed,
    forked,
    open_log,
    published,
    spec,
    step,
    submitted,
)


@pytest.fixture
def log(database_url: str) -> Iterator[Store]:
    """Two runs of the same events: versions 1 to 12, of which 5 to 9 and 11 are steps."""
    store = open_log(database_url)
    for run_id in ("a", "b"):
        steps = [step(n, float(n)) for n in range(1, 6)]
        append(store, run_id, [submitted(spec()), *claimed(), *steps, published(5), step(6, 6.0), SUCCEEDED])
    yield store
    store.engine.dispose()


def test_the_last_of_a_run_is_read_and_no_more(log: Store) -> None:
    with log.read() as connection:
        notices = board.last_notices(connection, "a", 3)
        assert [(r.run_id, r.version) for r in notices] == [("a", 12), ("a", 10), ("a", 4)]
        everything = board.last_notices(connection, "b", 99)
        assert [r.version for r in everything] == [12, 10, 4, 3, 2, 1]
        positions = [r.position for r in reversed(everything)]
        between = board.notices_between(connection, positions[1], positions[4], 2)
        assert [r.version for r in between] == [10, 4]
        assert [r.version for r in board.notices_between(connection, positions[1], positions[4], 9)] == [
            10,
            4,
            3,
        ]
        points = board.last_points(connection, "a", 5, 2)
        assert [(version, point.step, point.loss) for version, _, point in points] == [
            (9, 5, 5.0),
            (11, 6, 6.0),
        ]
        assert [point.step for _, _, point in board.last_points(connection, "a", 7, 9)] == [4, 5, 6]
        assert board.last_points(connection, "a", 11, 9) == []


def test_states_are_those_of_the_runs_that_were_asked_for(log: Store) -> None:
    with log.read() as connection:
        assert {name: run.run_id for name, run in board.states(connection, ["b", "x"]).items()} == {"b": "b"}
    with log.write(appends=False) as tx:
        tx.execute(sa.update(view_runs).where(view_runs.c.run_id == "b").values(state=b"torn"))
    with log.read() as connection:
        assert board.states(connection, ["a"])["a"].status == "succeeded"
        with pytest.raises(ViewDamaged, match=r"cannot be read for b\b"):
            board.states(connection, ["a", "b"])


def test_a_history_takes_in_as_much_as_it_is_asked_to(log: Store) -> None:
    with log.read() as connection:
        history = RunCurves()
        assert curves.advance(connection, "a", history, until_version=7, limit=4) == 4
        assert curves.advance(connection, "a", history, until_version=7) > 0
        assert list(history.curves.columns["loss"]) == [1.0, 2.0, 3.0]
        assert curves.advance(connection, "a", history, until_version=7) == 0
        assert curves.advance(connection, "a", history) > 0
        assert list(history.curves.columns["loss"]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        digest = published(5).manifest_digest
        assert event_store.branch_version(connection, forked("a", 3, digest)) == 10
        assert event_store.branch_version(connection, forked("a", 3, "another")) is None
        assert event_store.branch_version(connection, forked("x", 3, digest)) is None


def test_a_named_lease_is_one_daemons_until_it_expires_or_is_given_back(log: Store) -> None:
    def take(token: str, now: int) -> bool:
        with log.write(appends=False) as tx:
            return named_leases.take(tx, "mirror", token, f"daemon {token}", now, 10**12)

    def holder(name: str = "mirror") -> tuple[str, str] | None:
        with log.read() as connection:
            return named_leases.holder(connection, name)

    def release(token: str) -> None:
        with log.write(appends=False) as tx:
            named_leases.release(tx, "mirror", token)

    def check(token: str) -> None:
        with log.write(appends=False) as tx:
            named_leases.check(tx, "mirror", token)

    assert holder() is None
    assert take("one", 0)
    assert take("one", 5)
    assert not take("two", 5)
    assert holder() == ("one", "daemon one")
    assert holder("another") is None
    check("one")
    with pytest.raises(LeaseLost, match="lease on mirror"):
        check("two")
    release("two")
    assert holder() == ("one", "daemon one")
    release("one")
    assert holder() is None
    with pytest.raises(LeaseLost):
        check("one")
    assert take("two", 5)


def test_a_lease_that_another_has_taken_is_not_renewed_even_if_that_one_expired(log: Store) -> None:
    def renew(token: str) -> bool:
        with log.write(appends=False) as tx:
            return named_leases.renew(tx, token, 0, -1)

    with log.write(appends=False) as tx:
        assert named_leases.take(tx, "notices", "one", "d1", 0, -1), "expired as soon as it is taken"
    assert renew("one"), "nobody else took it"
    with log.write(appends=False) as tx:
        assert named_leases.take(tx, "notices", "two", "d2", 0, -1)
    assert not renew("one")
    with log.write(appends=False) as tx:
        assert named_leases.take(tx, "notices", "one", "d1", 0, 10**12)
        assert not named_leases.take(tx, "notices", "two", "d2", 0, 10**12)


def test_who_copies_is_told_of_each_table_with_its_rows(log: Store) -> None:
    told: list[tuple[str, int, int]] = []
    with log.read() as connection:
        digests = copying.digests(connection, lambda *progress: told.append(progress))
        filled = copying.first_filled(connection)
    rows = {name: digest.rows for name, digest in digests.items()}
    assert rows["events"] == 24
    assert rows[filled or ""]
    # A table without rows says nothing; one of few says it once, before the first.
    assert told == [(f"verifying {name}", 0, count) for name, count in rows.items() if count]


def test_a_ledger_goes_on_where_it_was_and_counts_nothing_twice(log: Store) -> None:
    with log.read() as connection:
        whole = goodput.read_ledger(connection, "a", NOON + 60 * SECOND)
        for cut in range(13):
            fold = Fold()
            version = goodput.advance(connection, "a", fold, 0, cut)
            assert version <= cut
            assert goodput.advance(connection, "a", fold, version) == 12
            assert goodput.advance(connection, "a", fold, 12) == 12
            assert fold.ledger(NOON + 60 * SECOND) == whole
        assert whole.seconds("productive") == 6
        assert goodput.read_ledger(connection, "x", NOON).wall_seconds == 0


def test_first_events_are_the_first_of_each_run_alone(log: Store) -> None:
    append(log, "c", [FAILED, submitted(spec())])
    with log.read() as connection:
        found = event_store.first_events(connection, "RunSubmitted")
        assert sorted((r.run_id, r.version) for r in found) == [("a", 1), ("b", 1)]
        assert event_store.first_events(connection, "StepCompleted") == []
        last = event_store.last_of(connection, "a", "StepCompleted")
        assert last is not None
        assert (last.run_id, last.version) == ("a", 11)
        assert event_store.last_of(connection, "a", "RunFailed") is None


def test_events_of_some_types_are_read_between_their_places(log: Store) -> None:
    types = ["RunSubmitted", "CheckpointPublished"]
    with log.read() as connection:

        def versions(rows: Iterable[Recorded]) -> list[tuple[str, int]]:
            return [(r.run_id, r.version) for r in rows]

        found = event_store.read_types(connection, ["a", "b"], types)
        assert versions(found) == [("a", 1), ("a", 10), ("b", 1), ("b", 10)]
        after = found[1].position
        assert versions(event_store.read_types_after(connection, after, types, 9)) == [("b", 1), ("b", 10)]
        assert versions(event_store.read_types_after(connection, after - 1, types, 2)) == [
            ("a", 10),
            ("b", 1),
        ]
        assert event_store.any_between(connection, after, after + 2)
        assert not event_store.any_between(connection, after, after + 1)
        rows = list(event_store.raw_rows(connection, "a", 1, types))
        assert [row["version"] for row in rows] == [10]
        assert [row["version"] for row in event_store.raw_rows(connection, "a", 3, (), 2)] == [4, 5]


def test_a_lease_is_its_holders_and_ends_with_its_place(log: Store) -> None:
    def each() -> list[tuple[str, int, str, str, int]]:
        with log.read() as connection:
            return [(x.run_id, x.attempt, x.token, x.owner, x.expires_at) for x in leases.leases(connection)]

    with log.write(appends=False) as tx:
        for run_id in ("a", "b"):
            leases.enqueue(tx, run_id, 3, 5)
            assert leases.lease(tx, run_id, 2, f"token {run_id}", "d", 50)
            assert not leases.lease(tx, run_id, 2, "another", "d", 50)
        assert leases.renew(tx, ["token a", "gone"], 60) == {"token a"}
        assert leases.renew(tx, [], 70) == set()
    assert each() == [("a", 2, "token a", "d", 60), ("b", 2, "token b", "d", 50)]
    with log.write(appends=False) as tx:
        old = leases.leases(tx.connection)[1]
        assert leases.take_over(tx, old, "new", "e", 80)
        assert not leases.take_over(tx, old, "newer", "f", 90)
        assert leases.expires_at(tx.connection, "b") == 80
        leases.check(tx, "b", "new")
        with pytest.raises(LeaseLost, match=r"lease on b\b"):
            leases.check(tx, "b", "token b")
        leases.wait_again(tx, "a", 9, priority=7)
        leases.hold(tx, "b")
        leases.release(tx, "a")
    assert each() == [("b", 2, "new", "e", 80)]
    with log.write(appends=False) as tx:
        leases.leave(tx, "b")
        leases.hold(tx, "a")
        assert not leases.lease(tx, "a", 3, "t", "d", 1), "held"
        leases.release(tx, "a")
        assert leases.lease(tx, "a", 3, "t", "d", 1)
        assert not leases.lease(tx, "b", 3, "t", "d", 1), "not in the queue"
        assert leases.expires_at(tx.connection, "b") is None
