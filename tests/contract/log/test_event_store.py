"""What the event store promises, on each database."""

from __future__ import annotations

import math
import struct
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftd.domain.errors import AmbiguousRun, ConcurrencyConflict, RunNotFound
from sftd.domain.log.events import (
    CheckpointStarted,
    Event,
    NewEvent,
    Recorded,
    SampleGenerated,
    StepCompleted,
)
from sftd.projections import views
from sftd.store.database.engine import Store, Tx
from sftd.store.database.tables import events, view_runs
from sftd.store.log import event_store, positions, runs
from sftd.store.queries.resolve import resolve_id
from tests.builders.patience import PATIENCE


def new(event: Event, event_id: str | None = None, **fields: Any) -> NewEvent:
    return NewEvent(
        event=event, event_id=event_id or str(uuid.uuid4()), occurred_at=5, actor="test", **fields
    )


def started(*steps: int) -> list[NewEvent]:
    return [new(CheckpointStarted(step=s)) for s in steps]


def append(store: Store, run_id: str, expected: int, items: list[NewEvent]) -> list[Recorded]:
    with store.write() as tx:
        return event_store.append(tx, run_id, expected, items, recorded_at=9)


def stream(store: Store, run_id: str, **options: Any) -> list[Recorded]:
    with store.read() as connection:
        return list(event_store.read_stream(connection, run_id, **options))


def count(store: Store) -> int:
    with store.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one()


def test_what_is_appended_is_read_back(store: Store) -> None:
    item = new(CheckpointStarted(step=7), attempt=2, causation_id="because")
    (written,) = append(store, "r", 0, [item])
    assert stream(store, "r") == [written]
    assert (written.run_id, written.version, written.type, written.schema_version) == (
        "r",
        1,
        "CheckpointStarted",
        1,
    )
    assert (written.event_id, written.occurred_at, written.recorded_at) == (item.event_id, 5, 9)
    assert (written.attempt, written.actor, written.causation_id, written.event) == (
        2,
        "test",
        "because",
        item.event,
    )


def test_versions_count_within_a_run_and_positions_over_all(store: Store) -> None:
    append(store, "a", 0, started(1, 2))
    append(store, "b", 0, started(1))
    append(store, "a", 2, started(3))
    assert [r.version for r in stream(store, "a")] == [1, 2, 3]
    assert [r.version for r in stream(store, "b")] == [1]
    with store.read() as connection:
        everything = event_store.read_all(connection)
        assert [r.run_id for r in everything] == ["a", "a", "b", "a"]
        assert event_store.last_position(connection) == everything[-1].position
    positions_ = [r.position for r in everything]
    assert positions_ == sorted(set(positions_))


def test_a_stream_is_read_from_a_version_by_type_and_up_to_a_limit(store: Store) -> None:
    sample = SampleGenerated(step=1, prompt="p", text="t", tokens=1, stopped=True)
    append(store, "r", 0, [*started(1), new(sample), *started(2, 3)])
    assert [r.version for r in stream(store, "r", after_version=2)] == [3, 4]
    assert [r.version for r in stream(store, "r", types=["SampleGenerated"])] == [2]
    assert [r.version for r in stream(store, "r", limit=2)] == [1, 2]
    assert stream(store, "none") == []


def test_what_is_no_step_is_found_among_many_steps_by_an_index(store: Store) -> None:
    append(store, "r", 0, [*started(1), *(new(step_completed(1.0, 1.0)) for _ in range(400)), *started(2)])
    with store.write(appends=False) as tx:
        tx.connection.exec_driver_sql("ANALYZE")
    query = event_store.of_run("r", 0, ["CheckpointStarted"], None)
    text = str(query.compile(store.engine, compile_kwargs={"literal_binds": True}))
    explain = "EXPLAIN" if store.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    with store.read() as connection:
        plan = "\n".join(str(row) for row in connection.exec_driver_sql(f"{explain} {text}"))
        assert "ix_events_history" in plan, plan
        found = event_store.read_types(connection, ["r"], ["CheckpointStarted"])
    assert [r.version for r in found] == [r.version for r in stream(store, "r", types=["CheckpointStarted"])]
    assert [r.version for r in found] == [1, 402]


def test_all_events_are_read_page_by_page(store: Store) -> None:
    append(store, "r", 0, started(*range(25)))
    seen: list[int] = []
    position = 0
    with store.read() as connection:
        while page := event_store.read_all(connection, position, limit=10):
            seen += [r.version for r in page]
            position = page[-1].position
    assert seen == list(range(1, 26))


def test_an_empty_log_is_at_position_zero(store: Store) -> None:
    with store.read() as connection:
        assert event_store.last_position(connection) == 0
        assert event_store.read_all(connection) == []


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_a_stream_that_has_moved_is_not_appended_to(store: Store, expected: int) -> None:
    append(store, "r", 0, started(1, 2))
    with pytest.raises(ConcurrencyConflict, match="at version 2"):
        append(store, "r", expected, started(9))
    assert count(store) == 2


def test_one_of_two_writers_with_the_same_expectation_wins(store: Store) -> None:
    barrier = threading.Barrier(4)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            append(store, "r", 0, started(number))
        except ConcurrencyConflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(attempt, range(4))) == [False, False, False, True]
    assert count(store) == 1


def test_an_event_id_is_there_once_in_a_run(store: Store) -> None:
    append(store, "a", 0, [new(CheckpointStarted(step=1), "same")])
    with pytest.raises(sa.exc.IntegrityError):
        append(
            store, "a", 1, [new(CheckpointStarted(step=2), "fine"), new(CheckpointStarted(step=2), "same")]
        )
    assert count(store) == 1


def test_appending_nothing_writes_nothing_and_calls_no_view(store: Store) -> None:
    called: list[str] = []
    observed = Store(store.engine, (lambda _tx: called.append("view"),))
    with observed.write() as tx:
        assert event_store.append(tx, "r", 0, [], recorded_at=1) == []
    assert called == []


def test_a_failure_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="midway"), store.write() as tx:
        event_store.append(tx, "r", 0, started(1, 2), recorded_at=1)
        positions.set_journal_cursor(tx, "r", 1, 2, 100)
        raise RuntimeError("midway")
    assert count(store) == 0
    with store.read() as connection:
        assert positions.journal_cursor(connection, "r", 1) == (0, 0)


def test_a_failing_view_takes_the_events_back(store: Store) -> None:
    def fail(_tx: Tx) -> None:
        raise RuntimeError("view")

    with pytest.raises(RuntimeError, match="view"):
        append(Store(store.engine, (fail,)), "r", 0, started(1))
    assert count(store) == 0


def test_a_view_sees_the_events_of_its_transaction(store: Store) -> None:
    seen: list[int] = []
    append(
        Store(store.engine, (lambda tx: seen.append(event_store.last_position(tx.connection)),)),
        "r",
        0,
        started(1, 2),
    )
    assert len(seen) == 1
    assert seen[0] > 0


def test_a_reader_has_one_snapshot(store: Store) -> None:
    append(store, "r", 0, started(1))
    with store.read() as connection:
        before = event_store.last_position(connection)
        append(store, "r", 1, started(2))
        assert event_store.last_position(connection) == before
    assert count(store) == 2


def test_no_event_is_lost_to_a_reader_by_position_when_an_earlier_append_commits_late(store: Store) -> None:
    """Writer A appends and is slow to commit, writer B appends after it. Without the lock, B's later position would become
    visible first, and a reader that goes on behind it would never see A's event."""
    a_has_appended, b_has_committed = threading.Event(), threading.Event()
    seen: list[str] = []

    def read_on(position: int) -> int:
        with store.read() as connection:
            for recorded in event_store.read_all(connection, position):
                seen.append(recorded.run_id)
                position = recorded.position
        return position

    def slow() -> int:
        with store.write() as tx:
            event_store.append(tx, "a", 0, started(1), recorded_at=1)
            a_has_appended.set()
            # B is held back until A has committed, so this wait runs out. If it were not, the reader would pass A by.
            assert not b_has_committed.wait(0.3)
            return read_on(0)

    def quick() -> None:
        assert a_has_appended.wait(PATIENCE)
        append(store, "b", 0, started(1))
        b_has_committed.set()

    with ThreadPoolExecutor(2) as pool:
        position = pool.submit(slow)
        pool.submit(quick).result(PATIENCE)
    assert position.result() == 0
    read_on(position.result())
    assert seen == ["a", "b"]


def test_position_order_is_commit_order_under_four_writers(store: Store) -> None:
    """A reader that always continues after the highest position it saw misses nothing."""
    per_writer, writers = 25, 4
    done = threading.Event()
    seen: list[tuple[str, int]] = []

    def write(number: int) -> None:
        for version in range(0, per_writer * 2, 2):
            append(store, f"run-{number}", version, started(version, version + 1))

    def follow() -> None:
        position, finished = 0, False
        while not finished:
            finished = done.is_set()
            with store.read() as connection:
                while page := event_store.read_all(connection, position, limit=7):
                    seen.extend((r.run_id, r.version) for r in page)
                    position = page[-1].position

    with ThreadPoolExecutor(writers + 1) as pool:
        reader = pool.submit(follow)
        try:
            list(pool.map(write, range(writers)))
        finally:
            done.set()
        reader.result(PATIENCE)
    assert len(seen) == len(set(seen)) == writers * per_writer * 2
    for number in range(writers):
        versions = [version for run_id, version in seen if run_id == f"run-{number}"]
        assert versions == list(range(1, per_writer * 2 + 1))


def test_positions_are_never_given_out_again(store: Store) -> None:
    append(store, "r", 0, started(1, 2))
    with store.write() as tx:
        last = event_store.last_position(tx.connection)
        tx.execute(sa.delete(events))
    assert append(store, "r", 0, started(1))[0].position > last


def bits(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


def step_completed(loss: float, lr: float) -> StepCompleted:
    return StepCompleted(
        step=1,
        epoch=0,
        loss=loss,
        grad_norm=0.1,
        lr=lr,
        tokens=1,
        tokens_real=1,
        tokens_padded=1,
        tokens_total=1,
        samples=1,
        samples_digest="d",
        seconds=1.0,
    )


_ODD = st.sampled_from(
    [0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, math.inf, -math.inf, math.nan, 0.1 + 0.2]
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats() | _ODD, st.floats() | _ODD), min_size=20, max_size=60))
def test_floats_read_back_bit_for_bit(store: Store, pairs: list[tuple[float, float]]) -> None:
    run_id = uuid.uuid4().hex
    append(store, run_id, 0, [new(step_completed(loss, lr)) for loss, lr in pairs])
    back = [r.event for r in stream(store, run_id)]
    assert [(bits(e.loss), bits(e.lr)) for e in back if isinstance(e, StepCompleted)] == [
        (bits(loss), bits(lr)) for loss, lr in pairs
    ]


def test_a_large_payload_with_every_kind_of_text_reads_back(store: Store) -> None:
    text = "ä😀\u2028\t\"'\\\n" * 200_000
    event = SampleGenerated(step=1, prompt="p", text=text, tokens=1, stopped=True)
    append(store, "r", 0, [new(event)])
    assert stream(store, "r")[0].event == event


def test_a_nul_in_a_text_reads_back(store: Store) -> None:
    """PostgreSQL holds no NUL in text; JSON escapes it."""
    event = SampleGenerated(step=1, prompt="\x00", text="\x00", tokens=1, stopped=True)
    append(store, "r", 0, [new(event)])
    assert stream(store, "r")[0].event == event


def test_raw_rows_are_the_table_as_it_stands(store: Store) -> None:
    append(store, "r", 0, started(1, 2))
    with store.read() as connection:
        rows = list(event_store.raw_rows(connection, "r", after_version=1))
    assert [(r["version"], r["payload"]) for r in rows] == [(2, '{"step":2}')]


# Positions.


def test_cursors_begin_at_zero_and_move(store: Store) -> None:
    with store.write() as tx:
        assert positions.journal_cursor(tx.connection, "r", 1) == (0, 0)
        positions.set_journal_cursor(tx, "r", 1, 3, 300)
        positions.set_journal_cursor(tx, "r", 2, 1, 100)
        positions.set_journal_cursor(tx, "r", 1, 4, 2**40)
    with store.read() as connection:
        assert positions.journal_cursor(connection, "r", 1) == (4, 2**40)
        assert positions.journal_cursor(connection, "r", 2) == (1, 100)
        assert positions.journal_cursor(connection, "s", 1) == (0, 0)


def test_projections_begin_at_zero_and_move(store: Store) -> None:
    with store.write() as tx:
        assert positions.projection_position(tx.connection, "p") == 0
        positions.set_projection_position(tx.connection, "p", 5)
        positions.set_projection_position(tx.connection, "p", 2**40)
        assert positions.projection_position(tx.connection, "p") == 2**40
        assert positions.projection_position(tx.connection, "q") == 0


# Runs.


@pytest.fixture
def viewed(store: Store) -> Store:
    """A store whose views are kept."""
    return Store(store.engine, (views.catch_up,))


def test_views_take_in_what_was_appended_without_them(store: Store, viewed: Store) -> None:
    """By an older sftd, say: of the run at hand, of another run, and at the border of what is read at once."""
    for run_id, steps in (("other", range(1, 4)), ("r", range(1, 1001))):
        append(store, run_id, 0, started(*steps))
    append(viewed, "r", 1000, started(1001))
    append(store, "other", 3, started(4))
    append(viewed, "r", 1001, started(1002))
    with viewed.read() as connection:
        found = dict(connection.execute(sa.select(view_runs.c.run_id, view_runs.c.version)).all())  # type: ignore[arg-type]
        assert positions.projection_position(connection, views.NAME) == event_store.last_position(connection)
    assert found == {"other": 4, "r": 1002}


def resolve(store: Store, prefix: str) -> str:
    with store.read() as connection:
        return resolve_id(connection, prefix)


def test_a_prefix_names_the_one_run_that_begins_with_it(viewed: Store) -> None:
    for run_id in ("brave-otter-1", "brave-otter-12", "calm-heron-2"):
        append(viewed, run_id, 0, started(1))
    assert resolve(viewed, "calm") == "calm-heron-2"
    assert resolve(viewed, "brave-otter-12") == "brave-otter-12"
    assert resolve(viewed, "brave-otter-1") == "brave-otter-1", "a whole id wins over being a prefix"
    with pytest.raises(AmbiguousRun, match=r"any of 2 runs: .*brave-otter-12 \(queued\)"):
        resolve(viewed, "brave")


@pytest.mark.parametrize(
    "prefix", ["", "%", "_", "calm%", "c_lm", "otter", "CALM", "calm-heron-2x", "'", "\\"]
)
def test_a_prefix_is_taken_literally(viewed: Store, prefix: str) -> None:
    append(viewed, "calm-heron-2", 0, started(1))
    with pytest.raises(RunNotFound):
        resolve(viewed, prefix)


def test_wildcards_in_an_id_are_letters(viewed: Store) -> None:
    for run_id in ("a_b", "axb", "a%c"):
        append(viewed, run_id, 0, started(1))
    assert resolve(viewed, "a_") == "a_b"
    assert resolve(viewed, "a%") == "a%c"


def test_many_matches_are_not_all_listed(viewed: Store) -> None:
    for number in range(8):
        append(viewed, f"r{number}", 0, started(1))
    with pytest.raises(AmbiguousRun, match=r"any of 8 runs: r0 .*r4 \(queued\) or others"):
        resolve(viewed, "r")


def test_a_run_is_loaded_from_its_events_with_or_without_its_view(store: Store) -> None:
    append(store, "r", 0, started(1, 2, 3))
    with store.read() as connection:
        run = runs.load_run(connection, "r")
        with pytest.raises(RunNotFound):
            runs.load_run(connection, "none")
    assert run.version == 3
    with store.write() as tx:
        columns = {c.name: 0 for c in view_runs.columns if not c.nullable}
        texts = {"run_id": "r", "status": "queued", "project": "p", "name": "n", "user": "u"}
        tx.execute(sa.insert(view_runs).values(**columns | texts | {"state": runs.encode_state(run)}))
    append(store, "r", 3, started(4))
    with store.read() as connection:
        assert runs.load_run(connection, "r").version == 4
