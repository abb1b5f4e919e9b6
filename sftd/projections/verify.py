"""Check the consistency of a database: the log is complete, and the views and the queue match it. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import UnknownEvent, ViewDamaged
from sftd.domain.run import goodput
from sftd.domain.run.fold import evolve
from sftd.domain.run.state import Run
from sftd.projections import views
from sftd.store.database.engine import Store
from sftd.store.database.tables import (
    events,
    projection_positions,
    queue,
    view_checkpoints,
    view_evaluations,
    view_files,
    view_goodput,
    view_runs,
    view_variants,
)
from sftd.store.log import event_store
from sftd.store.log.runs import decode_state, encode_state

_BATCH = 5000
_REBUILD = "`sftd views rebuild` fixes it"


class LogCheck(msgspec.Struct, frozen=True):
    """The number of events and runs checked, and all problems found."""

    events: int
    runs: int
    problems: list[str]


def check_log(store: Store, progress: Callable[[int, int], None]) -> LogCheck:
    """Check the whole log in one snapshot: versions have no gap, payloads decode, views equal the fold. Calls
    `progress(events done, total)`."""
    with store.read() as connection:
        log = _Log()
        total = connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one()
        query = sa.select(events).order_by(events.c.position).execution_options(yield_per=_BATCH)
        for number, row in enumerate(connection.execute(query)):
            if number % _BATCH == 0:
                progress(number, total)
            log.take(row)
        problems = [*log.problems, *_positions(connection, log.position)]
        if not problems:
            problems += _views(connection, log)
        problems += _queue(connection, log.runs)
        return LogCheck(total, len(log.runs), problems)


class _Log:
    """Folds every run in memory and collects problems."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.ledgers: dict[str, goodput.Fold] = {}
        self.variants: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.problems: list[str] = []
        self.position = 0

    def take(self, row: sa.Row[Any]) -> None:
        run = self.runs.get(row.run_id) or Run(row.run_id)
        self.position = row.position
        where = f"{row.run_id}, version {row.version} (position {row.position})"
        if row.version != run.version + 1:
            self.problems.append(f"{where}: the log's last version before it is {run.version}")
        try:
            recorded = event_store.to_recorded(row)
            run = evolve(run, recorded)
            if variant := views.variant_row(recorded):
                self.variants[(row.run_id,)] = variant
            ledger = self.ledgers.setdefault(row.run_id, goodput.Fold())
            if recorded.type in goodput.TYPES:
                ledger.add(recorded.occurred_at, recorded.event)
        except (UnknownEvent, ValueError, TypeError, KeyError) as error:  # msgspec's errors are ValueErrors
            self.problems.append(f"{where}: its {row.type} cannot be read: {error}")
            run = msgspec.structs.replace(run, version=row.version)
        self.runs[row.run_id] = run


def _positions(connection: sa.Connection, last: int) -> Iterator[str]:
    found = {row.name: row.position for row in connection.execute(sa.select(projection_positions))}
    for name, position in found.items():
        if position > last:
            yield f"projection {name} is at position {position}, but the log ends at {last}: events are missing"
    if (behind := found.get(views.NAME, 0)) < last:
        yield f"the views are at position {behind}, the log ends at {last}: {_REBUILD}"


def _views(connection: sa.Connection, log: _Log) -> Iterator[str]:
    runs = log.runs
    expected = {(run_id,): views.run_row(run) for run_id, run in runs.items()}
    yield from _differences(connection, view_runs, expected)
    yield from _differences(connection, view_variants, log.variants)
    checkpoints = [row for run in runs.values() for row in views.checkpoint_rows(run)]
    yield from _differences(
        connection, view_checkpoints, {(row["run_id"], row["step"]): row for row in checkpoints}
    )
    evaluations = [row for run in runs.values() for row in views.evaluation_rows(run)]
    yield from _differences(
        connection,
        view_evaluations,
        {(row["run_id"], row["name"], row["step"]): row for row in evaluations},
    )
    files = {(run_id,): row for run_id, run in runs.items() for row in views.files_rows(run)}
    yield from _differences(connection, view_files, files)
    # A run that is older than this view has no row until its next event.
    at_hand = set(connection.execute(sa.select(view_goodput.c.run_id)).scalars())
    ledgers = {
        (run_id,): views.goodput_row(run, log.ledgers[run_id])
        for run_id, run in runs.items()
        if run_id in at_hand
    }
    yield from _differences(connection, view_goodput, ledgers)


def _differences(
    connection: sa.Connection, table: sa.Table, expected: dict[tuple[Any, ...], dict[str, Any]]
) -> Iterator[str]:
    keys = [column.name for column in table.primary_key.columns]
    for row in connection.execute(sa.select(table).execution_options(yield_per=_BATCH)).mappings():
        key = tuple(row[name] for name in keys)
        where = f"{table.name}, {' '.join(str(part) for part in key)}"
        wanted = expected.pop(key, None)
        if wanted is None:
            yield f"{where}: is not in the log; {_REBUILD}"
        elif wrong := [name for name in wanted if _plain(name, row[name]) != wanted[name]]:
            yield f"{where}: {', '.join(wrong)} differ from the log; {_REBUILD}"
    for key in expected:
        yield f"{table.name}, {' '.join(str(part) for part in key)}: is missing; {_REBUILD}"


def _plain(name: str, value: Any) -> Any:
    """A value as this sftd writes it. An older sftd stored states without fields that were added later."""
    if name != "state":
        return value
    try:
        return encode_state(decode_state("", value))
    except ViewDamaged:
        return value


def _queue(connection: sa.Connection, runs: dict[str, Run]) -> Iterator[str]:
    queued = set(connection.execute(sa.select(queue.c.run_id)).scalars())
    for run_id in sorted(runs.keys() - queued):
        yield f"{run_id}: is in the log, but has no row in the queue: no daemon will ever start it"
    for run_id in sorted(queued - runs.keys()):
        yield f"{run_id}: has a row in the queue, but is not in the log"
