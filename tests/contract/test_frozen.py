"""A process that stops in the middle of a transaction does not stop the others for ever."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from sftd.store import engine as engine_module
from sftd.store.engine import Store, open_engine


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
        try:
            with frozen.write() as tx:
                tx.execute(sa.text("INSERT INTO projection_positions VALUES ('frozen', 1)"))
                holds.set()
                done.wait()
        except sa.exc.DBAPIError as error:
            failed.append(error)

    thread = threading.Thread(target=freeze)
    thread.start()
    holds.wait()
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
