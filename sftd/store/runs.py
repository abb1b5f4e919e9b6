"""The state of runs, from the log. The run view spares reading a whole stream; without it the answer is the same."""

from __future__ import annotations

from functools import cache

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import AmbiguousRun, RunNotFound
from sftd.domain.evolve import fold
from sftd.domain.run import Run
from sftd.store.event_store import read_stream
from sftd.store.tables import events, view_runs

_encoder = msgspec.json.Encoder()


@cache
def _state_decoder() -> msgspec.json.Decoder[Run]:
    # Made when it is needed: `sftd ls` imports this, reads no state, and has no time to lose.
    return msgspec.json.Decoder(Run)


def encode_state(run: Run) -> str:
    """A run's state as JSON; `load_run` reads it back."""
    return _encoder.encode(run).decode()


def decode_state(state: str) -> Run:
    """The way back. Raises `msgspec.MsgspecError`."""
    return _state_decoder().decode(state)


def load_run(connection: sa.Connection, run_id: str) -> Run:
    """The run as the log has it now. Raises `RunNotFound`."""
    state = connection.execute(sa.select(view_runs.c.state).where(view_runs.c.run_id == run_id)).scalar()
    run = decode_state(state) if state is not None else Run(run_id)
    run = fold(run, list(read_stream(connection, run_id, run.version)))
    if run.version == 0:
        raise RunNotFound(f"There is no run {run_id}. `sftd ls` lists the runs.")
    return run


def is_taken(connection: sa.Connection, run_id: str) -> bool:
    """Whether there is a run of this id."""
    started = sa.select(events.c.run_id).where(events.c.run_id == run_id, events.c.version == 1)
    return connection.execute(started).scalar() is not None


def resolve_id(connection: sa.Connection, prefix: str) -> str:
    """The id of the one run that begins with `prefix`. Raises `RunNotFound` or `AmbiguousRun`."""
    if is_taken(connection, prefix):
        return prefix
    # The view has a row for each run, the log millions. Not LIKE: % and _ in a prefix would match anything.
    run_id = view_runs.c.run_id
    matches = (
        sa.select(run_id).where(sa.func.substr(run_id, 1, len(prefix)) == prefix).order_by(run_id).limit(6)
    )
    found = list(connection.execute(matches).scalars()) if prefix else []
    if not found:
        raise RunNotFound(f"There is no run {prefix!r}. `sftd ls` lists the runs.")
    if len(found) > 1:
        raise AmbiguousRun(
            f"{prefix!r} could be {', '.join(found[:5])}{' or others' if len(found) > 5 else ''}."
        )
    return str(found[0])
