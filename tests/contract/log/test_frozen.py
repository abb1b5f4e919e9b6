"""A process that stops in the middle of a transaction does not stop the others for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from sftd.operations.commands import copy_database
from sftd.operations.context import Context
from sftd.store.database import engine as engine_module
from sftd.store.database.engine import Store, open_engine


def test_a_frozen_writer_loses_its_transaction(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip(
            "SQLite has nobody who could end the other's transaction; the error names the frozen daemon"
        )
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.5)
    frozen, other = Store(open_engine(database_url)), Store(open_engine(database_url))
    holds, done = threading.Event(), threading.Event()
    failed: list[Exception] = []

    def freeze() -> None:
        while not holds.is_set():
            try:
                with frozen.write() as tx:
                    tx.execute(sa.text("INSERT INTO projection_positions VALUES ('frozen', 1)"))
                    holds.set()
                    done.wait()
            except sa.exc.DBAPIError as error:
                # On a busy machine it may be too slow before it is frozen.
                if holds.is_set():
                    failed.append(error)

    thread = threading.Thread(target=freeze)
    thread.start()
    holds.wait()
    # Nobody takes the other one for frozen.
    monkeypatch.undo()
    # Waits for the append lock until the server takes it from the other.
    with other.write() as tx:
        names = list(tx.execute(sa.text("SELECT name FROM projection_positions")).scalars())
    done.set()
    thread.join()
    frozen.engine.dispose()
    other.engine.dispose()
    assert "frozen" not in names
    assert len(failed) == 1
    # What the daemon takes for a database that comes back.
    assert isinstance(failed[0], sa.exc.OperationalError | sa.exc.InternalError | sa.exc.InterfaceError)


def test_whoever_only_reads_may_take_its_time(store: Store) -> None:
    """A pager that nobody turns, a fold of millions of steps: neither keeps anybody from writing."""
    if store.engine.dialect.name == "sqlite":
        pytest.skip("SQLite ends nobody's transaction")
    limit = sa.text("SHOW idle_in_transaction_session_timeout")
    with store.write() as tx:
        assert tx.execute(limit).scalar() == "30s"
    with store.write(appends=False) as tx:
        assert tx.execute(limit).scalar() == "30s", "it may hold rows of the queue"
    with store.write(may_idle=True) as tx:
        assert tx.execute(limit).scalar() == "0"
    # The same connection as before, from the pool.
    with store.read() as connection:
        assert connection.execute(limit).scalar() == "0"


def test_a_copy_may_take_longer_than_a_frozen_writer(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the copy is read back, nothing is asked of the database that it came from."""
    target = Store(open_engine(f"sqlite:///{tmp_path}/target.db"))
    slow = threading.Event()

    def progress(what: str, _done: int, _total: int) -> None:
        if what == "verifying events":
            slow.wait(0.3)

    with store.write() as tx:
        tx.execute(sa.text("INSERT INTO projection_positions VALUES ('mlflow', 1)"))
        tx.execute(
            sa.text(
                "INSERT INTO events (event_id, run_id, version, type, schema_version, occurred_at, recorded_at, actor, payload)"
                " VALUES ('e', 'run', 1, 'RunReleased', 1, 1, 1, 'test', '{}')"
            )
        )
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.1)
    found = copy_database.copy(store, target, Context(actor="test"), progress)
    target.engine.dispose()
    assert (found["events"].rows, found["projection_positions"].rows) == (1, 1)
