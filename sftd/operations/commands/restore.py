"""Compare a restored database with the files of this host. Nothing here writes."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import sqlalchemy as sa

from sftd.domain.run.state import Run
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.store.log.runs import load_run
from sftd.store.queue import daemons, leases
from sftd.wire.attempt.directory import RunDir
from sftd.wire.checkpoint.directory import is_checkpoint_of

_STEP = re.compile(r"step-(\d+)")
_ATTEMPT = re.compile(r"attempt-(\d+)")


class RestoreOutlook(msgspec.Struct, frozen=True):
    """`newer`: checkpoints on this host that are not in the log, as (run, step, path). `unknown`: runs with a folder here that
    are not in the log. `later`: attempts with a folder here that are not in the log, as (run, attempt). `driven`: leases, as
    (run, attempt, host of their daemon)."""

    newer: list[tuple[str, int, str]]
    unknown: list[str]
    later: list[tuple[str, int]]
    driven: list[tuple[str, int, str]]


def outlook(store: Store, home: Path) -> RestoreOutlook:
    """Compare the log with the folders of this host."""
    with store.read() as connection:
        runs = [
            load_run(connection, run_id)
            for run_id in connection.execute(sa.select(view_runs.c.run_id)).scalars()
        ]
        owned = [(lease, daemons.find(connection, lease.owner)) for lease in leases.leases(connection)]
    known = {run.run_id for run in runs}
    folders = sorted(path.name for path in (home / "runs").glob("*") if path.is_dir())
    return RestoreOutlook(
        newer=[found for run in runs for found in _newer(run, home)],
        unknown=[name for name in folders if name not in known],
        later=[found for run in runs for found in _later(run, home)],
        driven=[(lease.run_id, lease.attempt, owner.host if owner else "") for lease, owner in owned],
    )


def _newer(run: Run, home: Path) -> list[tuple[str, int, str]]:
    known = {c.path for c in run.checkpoints}
    folder = RunDir(home, run.run_id).checkpoint_dir(run.spec.checkpoint.save_dir)
    return [
        (run.run_id, int(match[1]), str(path))
        for path in sorted(folder.glob("step-*"))
        if (match := _STEP.fullmatch(path.name))
        and str(path) not in known
        and is_checkpoint_of(str(path), run.run_id)
    ]


def _later(run: Run, home: Path) -> list[tuple[str, int]]:
    return [
        (run.run_id, int(match[1]))
        for path in sorted(RunDir(home, run.run_id).path.glob("attempt-*"))
        if (match := _ATTEMPT.fullmatch(path.name)) and int(match[1]) > run.attempt
    ]
