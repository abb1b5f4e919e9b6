"""Forks: the start of one, its check at submit, and the tree of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.run import decisions, trajectory
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.spec import Spec
from sftd.domain.submit.facts import HostDevices, Parent, SubmitFacts
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.store.log import event_store
from sftd.store.log.runs import load_run
from sftd.store.queries.resolve import resolve_id
from sftd.wire import preflight
from sftd.wire.attempt.direct_run import DAEMON
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.preflight import Preflight


def find(store: Store, prefix: str, step: int | None) -> tuple[Run, CheckpointInfo | None]:
    """The one run whose id begins with `prefix`, and its checkpoint from which a fork at `step` starts (see
    `decisions.fork_point`). Raises `Refused` if that is not on this host."""
    with store.read() as connection:
        parent = load_run(connection, resolve_id(connection, prefix))
    point = decisions.fork_point(parent, step)
    if point is not None and not Path(point.path).is_dir():
        what = f"its checkpoint of step {point.step} is not on this host: {point.path}"
        fix = "run this command on the host that trained it, or put the folder back"
        raise Refused(Problem(parent.run_id, what, fix))
    return parent, point


def inspect(
    store: Store,
    parent: Run,
    point: CheckpointInfo | None,
    spec: Spec,
    home: Path,
    *,
    hosts: list[HostDevices],
    changed_model: bool = False,
) -> Preflight:
    """Read the files that a fork's spec names, as a submit does, and check that the fork fits its parent. `hosts` are those that
    may start it. Raises `Refused`, also if the model folder changed since the parent was submitted; `changed_model` makes
    that a warning."""
    step = point.step if point else 0
    with store.read() as connection:
        types = (e.RunSubmitted.__name__,)
        submitted = next(event_store.read_stream(connection, parent.run_id, types=types, limit=1)).event
        assert isinstance(submitted, e.RunSubmitted)
        is_same_folder = spec.model.partial_pretrain == parent.spec.model.partial_pretrain
        known = Parent(
            run_id=parent.run_id,
            model=submitted.model,
            model_files=submitted.model_files if is_same_folder else None,
            own_files=submitted.model_files,
            spec=parent.spec,
            sources=parent.sources,
            may_change_files=changed_model,
            checkpoint=point.step if point else None,
            dtype=checkpoint_dir.saved(Path(point.path)).dtype if point else "",
            is_direct=parent.daemon == DAEMON or _is_direct(connection, parent),
        )
    return preflight.inspect(
        spec,
        lambda train: trajectory.forked_order(parent, step, spec, train.digest, train.sources)[0],
        known=SubmitFacts(parent=known, hosts=hosts, has_checkpoint=point is not None),
        home=home,
    )


def _is_direct(connection: sa.Connection, parent: Run) -> bool:
    claims = event_store.read_stream(connection, parent.run_id, types=(e.AttemptClaimed.__name__,))
    return any(isinstance(r.event, e.AttemptClaimed) and r.event.daemon == DAEMON for r in claims)


class Member(msgspec.Struct, frozen=True):
    """A run in a tree of forks. `forked_at` is the step of `parent` after which it begins. Both are None for the root."""

    run_id: str
    parent: str | None
    forked_at: int | None
    changes: dict[str, Any]
    status: str
    step: int
    planned_steps: int
    loss: str | None
    val_loss: str | None
    forks: list[Member]


def lineage(store: Store, prefix: str) -> tuple[str, Member]:
    """The id of the one run that begins with `prefix`, and the root of its tree of forks."""
    with store.read() as connection:
        run_id = resolve_id(connection, prefix)
        forked = event_store.first_events(connection, e.RunForked.__name__)
        points = {r.run_id: r.event for r in forked if isinstance(r.event, e.RunForked)}
        children: dict[str, list[str]] = {}
        for name, point in sorted(points.items(), key=lambda item: (item[1].step, item[0])):
            children.setdefault(point.parent, []).append(name)
        root = run_id
        while root in points:
            root = points[root].parent
        members = [root]
        for name in members:
            members += children.get(name, [])
        rows = _rows(connection, members)

    def member(name: str) -> Member:
        point = points.get(name)
        return Member(
            run_id=name,
            parent=point.parent if point else None,
            forked_at=point.step if point else None,
            changes=point.changes if point else {},
            forks=[member(child) for child in children.get(name, [])],
            **rows[name],
        )

    return run_id, member(root)


_SHOWN = ("status", "step", "planned_steps", "loss", "val_loss")


def _rows(connection: sa.Connection, run_ids: list[str]) -> dict[str, dict[str, Any]]:
    c = view_runs.c
    query = sa.select(c.run_id, *(c[name] for name in _SHOWN)).where(c.run_id.in_(run_ids))
    return {row.run_id: {name: row._mapping[name] for name in _SHOWN} for row in connection.execute(query)}
