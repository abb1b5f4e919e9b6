"""A run's checkpoints: find one, list all, delete those that no retention rule protects, record exports."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import msgspec
import sqlalchemy as sa

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.run.decisions import refuse_removed
from sftd.domain.run.retention import deletable, why_kept
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store
from sftd.store.log.event_store import read_stream
from sftd.store.log.runs import load_run
from sftd.store.queries.resolve import resolve_id
from sftd.store.queue import leases
from sftd.store.queue.leases import Lease
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.checkpoint.directory import WEIGHTS, is_checkpoint_of

# The events of a checkpoint's life.
_FATES = tuple(
    t.__name__
    for t in (e.CheckpointPublished, e.CheckpointReduced, e.CheckpointRejected, e.CheckpointDeleted)
)


def find(store: Store, prefix: str, step: int | None) -> tuple[Run, CheckpointInfo]:
    """The one run whose id begins with `prefix`, and its published checkpoint of `step` (None: the timeline's newest).

    Raises `RunNotFound` or `AmbiguousRun`, and `Refused` if there is no such checkpoint on this host.
    """
    with store.read() as connection:
        run = load_run(connection, resolve_id(connection, prefix))
    timeline = [c for c in run.checkpoints if not c.superseded]
    if step is None:
        found = timeline[-1] if timeline else None
    else:
        found = next((c for c in run.checkpoints if c.step == step), None)
    if found is None:
        refuse_removed(run)
        have = ", ".join(str(c.step) for c in run.checkpoints)
        if have:
            which = f"no checkpoint of step {step}" if step is not None else "no checkpoint in its timeline"
            raise Refused(Problem(run.run_id, f"has {which}", f"use --step with one of {have}"))
        fix = "wait until it has saved one (trainer.save_interval), or resume it"
        raise Refused(Problem(run.run_id, f"is {run.status} and has no published checkpoint", fix))
    if not Path(found.path).is_dir():
        what = f"its checkpoint of step {found.step} is not on this host: {found.path}"
        fix = "run this command on the host that trained it, or put the folder back"
        raise Refused(Problem(run.run_id, what, fix))
    return run, found


def chat_template(store: Store, run_id: str) -> ChatTemplate | None:
    """The chat template that the run's data was rendered with; None if it is unknown."""
    with store.read() as connection:
        for recorded in read_stream(connection, run_id, types=(e.RunSubmitted.__name__,), limit=1):
            if isinstance(recorded.event, e.RunSubmitted) and (found := recorded.event.data.get("template")):
                return msgspec.convert(found, ChatTemplate)
    return None


def record_export(
    store: Store, context: Context, run_id: str, event: e.ModelExported | e.ExportProven | e.ExportDiverged
) -> None:
    """Record that the model of a checkpoint was exported, or what its proof found."""
    with store.write() as tx:
        run = current(tx.connection, run_id)
        append_decided(tx, context, run_id, run.version, [event])


def record_registration(store: Store, context: Context, run_id: str, registered: e.ModelRegistered) -> None:
    """Record that an exported model was registered in MLflow, unless the log has that already."""
    with store.write() as tx:
        there = read_stream(tx.connection, run_id, types=(e.ModelRegistered.__name__,))
        same = (registered.name, registered.model_version)
        if any(
            (r.event.name, r.event.model_version) == same
            for r in there
            if isinstance(r.event, e.ModelRegistered)
        ):
            return
        run = current(tx.connection, run_id)
        append_decided(tx, context, run_id, run.version, [registered])


def exports(store: Store, run_id: str) -> list[e.ModelExported]:
    """A run's exports, in order."""
    with store.read() as connection:
        recorded = read_stream(connection, run_id, types=(e.ModelExported.__name__,))
        return [r.event for r in recorded if isinstance(r.event, e.ModelExported)]


class CheckpointRow(msgspec.Struct, frozen=True):
    """The state of one checkpoint. `status` is `published`, `pinned` (a fork starts from it), `superseded` (a later attempt
    restarted before it), `weights` (reduced to its weights), `missing` (its folder or manifest is not on this host), `deleted`
    or `rejected` (damaged). `layout` holds the parallel sizes in which it was saved; empty if its manifest is unreadable."""

    step: int
    status: str
    path: str
    bytes: int
    layout: dict[str, int]
    val_loss: float | str | None
    published_at: e.Micros
    kept_because: list[str]


def overview(store: Store, run: Run) -> list[CheckpointRow]:
    """Every checkpoint that the run has published, deleted ones included, by step and time."""
    reasons = why_kept(run)
    rows = [
        CheckpointRow(
            step=c.step,
            status=_status(c),
            path=c.path,
            bytes=c.bytes,
            layout=checkpoint_dir.saved(Path(c.path)).layout,
            val_loss=c.val_loss,
            published_at=c.published_at,
            kept_because=reasons[c.step],
        )
        for c in run.checkpoints
    ]
    rows += _gone(store, run)
    return sorted(rows, key=lambda row: (row.step, row.published_at))


def is_missing(c: CheckpointInfo) -> bool:
    """Whether a checkpoint's folder or its manifest is not on this host."""
    return not (Path(c.path) / checkpoint_dir.MANIFEST).is_file()


def missing_here(connection: sa.Connection, run: Run, host: str) -> frozenset[int]:
    """Steps whose checkpoints are missing. Empty unless `host` drove the run's last attempt: other hosts need not have them."""
    claims = read_stream(connection, run.run_id, types=(e.AttemptClaimed.__name__,))
    hosts = [r.event.host for r in claims if isinstance(r.event, e.AttemptClaimed)]
    if hosts[-1:] != [host]:
        return frozenset()
    return frozenset(c.step for c in run.checkpoints if is_missing(c))


def _status(c: CheckpointInfo) -> str:
    if is_missing(c):
        return "missing"
    return (
        "pinned"
        if c.forks
        else "superseded"
        if c.superseded
        else "weights"
        if c.weights_only
        else "published"
    )


def _gone(store: Store, run: Run) -> list[CheckpointRow]:
    found: list[CheckpointRow] = []
    there: dict[int, CheckpointRow] = {}
    with store.read() as connection:
        for r in read_stream(connection, run.run_id, types=_FATES):
            match r.event:
                case e.CheckpointPublished(step=step, path=path, bytes=size):
                    there[step] = CheckpointRow(step, "", path, size, {}, None, r.occurred_at, [])
                case e.CheckpointReduced(step=step, path=path, bytes=size) if step in there:
                    there[step] = msgspec.structs.replace(there[step], path=path, bytes=size)
                case e.CheckpointRejected(step=step) if step in there:
                    found.append(msgspec.structs.replace(there.pop(step), status="rejected"))
                case e.CheckpointDeleted(step=step) if step in there:
                    found.append(msgspec.structs.replace(there.pop(step), status="deleted"))
    return found


def collectable(connection: sa.Connection, run: Run) -> list[e.CheckpointDeleted]:
    """Deletion events for the checkpoints on this host that no retention rule protects."""
    stale = _stale(connection, run) if run.status == "succeeded" else []
    return [*unkept(run), *(c for c in stale if is_checkpoint_of(c.path, run.run_id))]


def unkept(run: Run) -> list[e.CheckpointDeleted]:
    """Those of `collectable` that are in the run's state. Their manifests must name the run: an imported history may hold any
    path."""
    return [
        e.CheckpointDeleted(
            step=c.step, path=c.path, bytes=c.bytes, reason="superseded" if c.superseded else "retention"
        )
        for c in deletable(run)
        if is_checkpoint_of(c.path, run.run_id)
    ]


def _stale(connection: sa.Connection, run: Run) -> list[e.CheckpointDeleted]:
    """Checkpoint folders that are no longer in the run's state: damaged ones, which are kept for inspection until the run
    succeeds, and those of steps that were saved again at another path."""
    published: dict[str, e.CheckpointDeleted] = {}
    for r in read_stream(connection, run.run_id, types=_FATES):
        match r.event:
            case e.CheckpointPublished(step=step, path=path, bytes=size):
                published[path] = e.CheckpointDeleted(step=step, path=path, bytes=size, reason="replaced")
            case e.CheckpointReduced(path=path, former_path=former) if former in published:
                published[path] = msgspec.structs.replace(
                    published.pop(former), path=path, bytes=r.event.bytes
                )
            case e.CheckpointRejected(path=path) if path in published:
                published[path] = msgspec.structs.replace(published[path], reason="rejected")
            case e.CheckpointDeleted(path=path):
                published.pop(path, None)
    here = {c.path for c in run.checkpoints}
    # A fork names the folder that it starts from.
    return [c for path, c in published.items() if path not in here and c.step not in run.pins]


def collect(
    store: Store, context: Context, run_id: str, lease: Lease | None = None
) -> list[e.CheckpointDeleted]:
    """Delete every unprotected checkpoint that no process reads. Returns the deletions.

    The order is: lock out readers, record, delete. So every live checkpoint in the log exists, and no deleted one is being
    read. A crash leaves at most a superfluous folder, which `sweep` removes.
    """
    with store.read() as connection:
        there = collectable(connection, load_run(connection, run_id))
    with ExitStack() as unread:
        free = {c.path for c in there if unread.enter_context(checkpoint_dir.unread(Path(c.path)))}
        if not free:
            return []
        with store.write() as tx:
            if lease is not None:
                leases.check(tx, run_id, lease.token)
            elif leases.expires_at(tx.connection, run_id) is not None:
                # Another attempt has begun in the meantime: its daemon decides.
                return []
            run = current(tx.connection, run_id)
            gone = [c for c in collectable(tx.connection, run) if c.path in free]
            append_decided(tx, context, run_id, run.version, list(gone), run.attempt or None)
        for deleted in gone:
            checkpoint_dir.remove(Path(deleted.path))
    return gone


def sweep(store: Store, run_id: str) -> None:
    """Finish the deletions that a crash interrupted. Call it only while no attempt of the run is alive."""
    with store.read() as connection:
        run = load_run(connection, run_id)
        types = (e.CheckpointDeleted.__name__, e.CheckpointReduced.__name__)
        deleted, weights = set(), set()
        for r in read_stream(connection, run_id, types=types):
            match r.event:
                case e.CheckpointDeleted(path=path):
                    deleted.add(Path(path))
                case e.CheckpointReduced(path=path, former_path=former):
                    deleted.add(Path(former))
                    weights.add(Path(path))
    own = {Path(c.path) for c in run.checkpoints if not c.is_parents}
    # Weights that were written but not recorded.
    made = {left for folder in {path.parent for path in own} for left in folder.glob(f"step-*{WEIGHTS}")}
    gone = {path for path in (deleted - own) | (made - weights) if is_checkpoint_of(str(path), run_id)}
    for folder in {path.parent for path in gone | own}:
        checkpoint_dir.sweep(folder, [path for path in gone if path.parent == folder])
