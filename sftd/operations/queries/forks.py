"""Forks: from where one starts, whether it may, and the tree that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.model.shape import ModelShape
from sftd.domain.run import decisions, trajectory
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.spec import Spec
from sftd.operations.queries import model_files
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.store.log import event_store
from sftd.store.log.runs import load_run
from sftd.store.queries.resolve import resolve_id
from sftd.wire import preflight
from sftd.wire.attempt.direct_run import DAEMON
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.model import digest as model_digest
from sftd.wire.preflight import Preflight

# What of a model's shape may change without its parameters being others.
_FREE_SHAPE = frozenset(
    {"max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "unsupported"}
)


def find(store: Store, prefix: str, step: int | None) -> tuple[Run, CheckpointInfo | None]:
    """The one run whose id begins with `prefix`, and the checkpoint of it from which a fork at `step` would start (see
    `decisions.fork_point`). Raises `Refused` when it is not on this host."""
    with store.read() as connection:
        parent = load_run(connection, resolve_id(connection, prefix))
    point = decisions.fork_point(parent, step)
    if point is not None and not Path(point.path).is_dir():
        what = f"its checkpoint of step {point.step} is not on this host: {point.path}"
        raise Refused(Problem(parent.run_id, what, "ask on the host that trained it, or put the folder back"))
    return parent, point


def inspect(
    store: Store,
    parent: Run,
    point: CheckpointInfo | None,
    spec: Spec,
    home: Path,
    *,
    changed_model: bool = False,
) -> Preflight:
    """Read the files that the spec of a fork names, as a submit does, and see that the checkpoint fits it. Raises
    `Refused`, also when the model folder changed since the parent was submitted; with `changed_model` that is a warning."""
    step = point.step if point else 0
    found = preflight.inspect(
        spec, lambda digest: trajectory.forked_order(parent, step, spec, digest), home=home
    )
    if changed := _changed_files(store, parent, spec, found, pretrained=point is None):
        if not changed_model:
            fix = "put the folder back as it was, or add --changed-model to use it as it is now"
            raise Refused(model_digest.with_fix(changed, fix))
        found = msgspec.structs.replace(found, warnings=[*found.warnings, *changed])
    if point is None:
        return found
    problems = _other_model(store, parent, found.shape)
    wanted, saved = spec.model.megatron.params_dtype, checkpoint_dir.saved(Path(point.path)).dtype
    if saved and wanted not in ("auto", saved):
        what = f"is {wanted}, but the checkpoint of step {step} was trained in {saved}"
        problems.append(
            Problem("model.megatron.params_dtype", what, f"leave it at auto, or set it to {saved}")
        )
    if problems:
        raise Refused(problems)
    if parent.daemon == DAEMON or _is_direct(store, parent):
        what = "was trained without a daemon: its training command knows nothing of this fork"
        fix = f"continue it with `sftd resume {parent.run_id}`, or that command may delete the checkpoint"
        found = msgspec.structs.replace(found, warnings=[*found.warnings, Problem(parent.run_id, what, fix)])
    return found


def _changed_files(
    store: Store, parent: Run, spec: Spec, found: Preflight, *, pretrained: bool
) -> list[Problem]:
    """What changed in a model folder that the fork takes over from its parent."""
    if spec.model.partial_pretrain != parent.spec.model.partial_pretrain or found.model_files is None:
        return []
    was = model_files.recorded(store, parent.run_id).files
    if was is None:
        return []
    return model_digest.changes(was, found.model_files, spec, weights=pretrained, run=parent.run_id)


def _is_direct(store: Store, parent: Run) -> bool:
    with store.read() as connection:
        claims = event_store.read_stream(connection, parent.run_id, types=(e.AttemptClaimed.__name__,))
        return any(isinstance(r.event, e.AttemptClaimed) and r.event.daemon == DAEMON for r in claims)


def _other_model(store: Store, parent: Run, shape: ModelShape) -> list[Problem]:
    with store.read() as connection:
        types = (e.RunSubmitted.__name__,)
        submitted = next(event_store.read_stream(connection, parent.run_id, types=types, limit=1)).event
    assert isinstance(submitted, e.RunSubmitted)
    now = msgspec.to_builtins(shape)
    return [
        Problem(
            "model.partial_pretrain",
            f"has {key} {now[key]!r}, but the checkpoint is of a model with {was!r}",
            "a fork keeps its parent's model; submit a run for another one",
        )
        for key, was in submitted.model.items()
        if key in now and key not in _FREE_SHAPE and now[key] != was
    ]


class Member(msgspec.Struct, frozen=True):
    """A run in a tree of forks. `forked_at` is the step of `parent` behind which it begins; both None for the root."""

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
    """The id of the one run that begins with `prefix`, and the root of the tree of forks that it is in."""
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
