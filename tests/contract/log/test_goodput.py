"""The ledger read from the database is the fold of the run's events, and of no others."""

from __future__ import annotations

import uuid

import pytest
import sqlalchemy as sa

from sftd.domain.log import events as e
from sftd.domain.run.goodput import Fold
from sftd.projections import verify, views
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_goodput
from sftd.store.log import event_store
from sftd.store.log.goodput import advance, read_fold, read_ledger
from tests.builders.log import histories

SECOND = 1_000_000


def step(number: int, seconds: float) -> e.StepCompleted:
    return histories.step(number, float("nan"), grad_norm=float("inf"), tokens=1, seconds=seconds)


HISTORY: list[e.Event] = [
    e.RunSubmitted(
        spec={}, spec_digest="s", planned_steps=4, user="ada", data={}, model={}, sftd_version="0"
    ),
    e.AttemptClaimed(daemon="d", host="h", from_step=0),
    e.ModelLoaded(architecture="a", parameters=1, dtype="f", device="cpu", seconds=0.1, environment={}),
    step(1, 0.7),
    step(2, 0.3),
    e.CheckpointStarted(step=2),
    e.CheckpointPublished(step=2, path="p", bytes=1, manifest_digest="m", seconds=1.0),
    step(3, 0.1),
    e.AttemptFailed(cause="crash", message="m", exit_code=1),
    e.AttemptClaimed(daemon="d", host="h", from_step=2),
    step(3, 1 / 3),
    step(4, 1e-7),
    e.ValidationCompleted(step=4, loss=1.0, tokens=1, rows=1, seconds=0.25),
    e.RunSucceeded(steps=4, tokens=4, final_checkpoint="p"),
]


def test_the_ledger_in_the_database_is_the_fold_of_the_events(store: Store) -> None:
    for run_id, seconds in (("other", 7), ("run", 2)):
        new = [
            e.NewEvent(
                event=event, event_id=str(uuid.uuid4()), occurred_at=n * seconds * SECOND, actor="test"
            )
            for n, event in enumerate(HISTORY, 1)
        ]
        with store.write() as tx:
            event_store.append(tx, run_id, 0, new, 0)
    fold = Fold()
    with store.read() as connection:
        for recorded in event_store.read_stream(connection, "run"):
            fold.add(recorded.occurred_at, recorded.event)
            expected = fold.ledger(recorded.occurred_at)
            assert (
                read_ledger(connection, "run", recorded.occurred_at, until_version=recorded.version)
                == expected
            )
        assert read_ledger(connection, "run", now=10**15) == expected
    assert expected.micros["replayed"] == 333_333
    assert expected.wall_seconds == 2 * (len(HISTORY) - 1)


def new(event: e.Event, number: int) -> e.NewEvent:
    return e.NewEvent(event=event, event_id=str(uuid.uuid4()), occurred_at=number * SECOND, actor="test")


@pytest.mark.parametrize("at_once", [1, 2, 3, len(HISTORY)])
def test_the_view_has_it_folded_up_to_the_last_event(
    store: Store, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What one transaction brings is folded in parts when it is much.
    monkeypatch.setattr(views, "_PART", 5)
    store.before_commit = (views.catch_up,)
    for first in range(0, len(HISTORY), at_once):
        with store.write() as tx:
            batch = [new(event, n) for n, event in enumerate(HISTORY[first : first + at_once], first + 1)]
            event_store.append(tx, "run", first, batch, 0)
        if first == 3 * at_once:
            # As it is for a run from before there was this view.
            with store.write() as tx:
                tx.execute(sa.delete(view_goodput))
    with store.read() as connection:
        whole = Fold()
        advance(connection, "run", whole, 0)
        assert read_fold(connection, "run") == (whole, len(HISTORY))
        assert read_ledger(connection, "run", 10**15) == whole.ledger(10**15)


def test_a_view_that_says_otherwise_is_found(store: Store) -> None:
    store.before_commit = (views.catch_up,)
    with store.write() as tx:
        event_store.append(tx, "run", 0, [new(event, n) for n, event in enumerate(HISTORY, 1)], 0)
    before = verify.check_log(store, lambda *_: None).problems
    with store.write() as tx:
        fold = sa.func.replace(view_goodput.c.fold, '"attempts":2', '"attempts":3')
        tx.execute(sa.update(view_goodput).values(fold=fold))
    found = [p for p in verify.check_log(store, lambda *_: None).problems if p not in before]
    assert len(found) == 1
    assert found[0].startswith("view_goodput, run: fold differ")
