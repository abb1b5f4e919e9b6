"""What a live board, a copy and a claim ask of the database: at most so much, in order, and of the right run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from sftd.domain.curves import History
from sftd.domain.errors import ViewDamaged
from sftd.store import board, claims, copying, curves
from sftd.store.engine import Store
from sftd.store.tables import view_runs
from tests.histories import SUCCEEDED, append, claimed, open_log, published, spec, step, submitted


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
        history = History()
        assert curves.advance(connection, "a", history, until_version=7, limit=4) == 4
        assert curves.advance(connection, "a", history, until_version=7) > 0
        assert list(history.curves.columns["loss"]) == [1.0, 2.0, 3.0]
        assert curves.advance(connection, "a", history, until_version=7) == 0
        assert curves.advance(connection, "a", history) > 0
        assert list(history.curves.columns["loss"]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        digest = published(5).manifest_digest
        assert curves.published_at_version(connection, "a", digest) == 10
        assert curves.published_at_version(connection, "a", "another") is None
        assert curves.published_at_version(connection, "x", digest) is None


def test_a_claim_is_one_daemons_until_it_expires_or_is_given_back(log: Store) -> None:
    def hold(token: str, now: int) -> bool:
        with log.write(appends=False) as tx:
            return claims.hold(tx, "mirror", token, f"daemon {token}", now, 10**12)

    def holder(name: str = "mirror") -> tuple[str, str] | None:
        with log.read() as connection:
            return claims.holder(connection, name)

    def release(token: str) -> None:
        with log.write(appends=False) as tx:
            claims.release(tx, "mirror", token)

    assert holder() is None
    assert hold("one", 0)
    assert hold("one", 5)
    assert not hold("two", 5)
    assert holder() == ("one", "daemon one")
    assert holder("another") is None
    release("two")
    assert holder() == ("one", "daemon one")
    release("one")
    assert holder() is None
    assert hold("two", 5)


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
