"""The log that most suites start from: the store with its views, on the server's time or on a clock."""

from __future__ import annotations

import pytest

from sftd.projections import views
from sftd.store.database.engine import Store
from tests.builders.log.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(request: pytest.FixtureRequest, store: Store) -> Store:
    """The store with its views, as the command line opens it. In a test that has a `clock`, the time of a server is that
    clock's, too."""
    if "clock" in request.fixturenames:
        return Store(store.engine, before_commit=(views.catch_up,), clock=lambda _connection, local: local)
    return Store(store.engine, before_commit=(views.catch_up,))
