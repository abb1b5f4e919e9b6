"""The state of runs, from the log. The run view is a cache: it saves reading the whole stream and never changes the result."""

from __future__ import annotations

from functools import cache

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import RunNotFound, ViewDamaged
from sftd.domain.run.fold import fold
from sftd.domain.run.state import Run
from sftd.store.database.tables import events, view_runs
from sftd.store.log.event_store import read_stream

_encoder = msgspec.json.Encoder()


@cache
def _state_decoder() -> msgspec.json.Decoder[Run]:
    # Built on first use because it is slow: `sftd ls` imports this module but reads no state.
    return msgspec.json.Decoder(Run)


def encode_state(run: Run) -> str:
    """A run's state as JSON; `load_run` reads it back."""
    return _encoder.encode(run).decode()


def decode_state(run_id: str, state: str) -> Run:
    """The inverse of `encode_state`. Raises `ViewDamaged`."""
    try:
        return _state_decoder().decode(state)
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise ViewDamaged(view_runs.name, run_id, error) from None


def load_run(connection: sa.Connection, run_id: str) -> Run:
    """The current state of a run. Raises `RunNotFound` or `ViewDamaged`."""
    state = connection.execute(sa.select(view_runs.c.state).where(view_runs.c.run_id == run_id)).scalar()
    run = decode_state(run_id, state) if state is not None else Run(run_id)
    run = fold(run, list(read_stream(connection, run_id, run.version)))
    if run.version == 0:
        raise RunNotFound(f"There is no run {run_id}. `sftd ls` lists the runs.")
    return run


def is_taken(connection: sa.Connection, run_id: str) -> bool:
    """Whether a run with this id exists."""
    started = sa.select(events.c.run_id).where(events.c.run_id == run_id, events.c.version == 1)
    return connection.execute(started).scalar() is not None
