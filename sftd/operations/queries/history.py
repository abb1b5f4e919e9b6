"""Replay a run: its state at any moment, and the steps that can be trained again and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa

from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events as e
from sftd.domain.log.history import AtStep, AtTime, AtVersion, Moment, up_to
from sftd.domain.log.model_record import ModelRecord, record_of
from sftd.domain.log.timeline import LoggedStep, logged_steps
from sftd.domain.run.fold import fold
from sftd.domain.run.loss_watch import losses_before
from sftd.domain.run.state import ENDED, CheckpointInfo, Run
from sftd.operations.context import Context, append_decided, current
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.store.log.runs import is_taken, load_run
from sftd.store.queries.resolve import resolve_id
from sftd.store.queue import leases


class Chapter(msgspec.Struct, frozen=True):
    """A part of a run's history: its own stream, or a parent's stream up to the fork. `last_step` is the fork's step, None for
    the run itself."""

    run_id: str
    recorded: list[e.Recorded]
    last_step: int | None = None

    def run(self, version: int | None = None) -> Run:
        """The state at the end of the chapter, or at a version."""
        return fold(Run(self.run_id), self.recorded[:version])


def chapters(store: Store, prefix: str) -> list[Chapter]:
    """The history of the one run that `prefix` means, oldest ancestor first, the run itself last.

    Parents that are not in this database are left out. Raises `RunNotFound` or `AmbiguousRun`.
    """
    with store.read() as connection:
        run_id = resolve_id(connection, prefix)
        found = [Chapter(run_id, list(event_store.read_stream(connection, run_id)))]
        while (fork := _fork(found[0])) is not None and fork.step > 0:
            if not is_taken(connection, fork.parent):
                break
            recorded = list(event_store.read_stream(connection, fork.parent))
            version = event_store.branch_version(connection, fork)
            end = AtStep(fork.step) if version is None else AtVersion(version)
            found.insert(0, Chapter(fork.parent, up_to(recorded, end), fork.step))
    return found


def _fork(chapter: Chapter) -> e.RunForked | None:
    first = chapter.recorded[0].event
    return first if isinstance(first, e.RunForked) else None


def until(history: Sequence[Chapter], moment: Moment) -> list[Chapter]:
    """The history up to a moment. The last chapter is the run to which the moment belongs. Raises `Refused`.

    A version counts in the run's own stream. Steps up to the fork belong to the parents.
    """
    end = len(history)
    match moment:
        case AtVersion():
            pass
        case AtStep(step):
            # At the fork's step, the fork itself exists.
            end = 1 + history.index(chapter_of_step(history, step + 1))
        case AtTime(micros):
            while end and history[end - 1].recorded[0].occurred_at > micros:
                end -= 1
            if not end:
                what = f"{history[-1].run_id} had not been submitted then"
                fix = "give a later time; `sftd show` prints the time of submission"
                raise Refused(Problem("--until", what, fix))
    last = history[end - 1]
    recorded = up_to(last.recorded, moment)
    return [*history[: end - 1], msgspec.structs.replace(last, recorded=recorded)]


def chapter_of_step(history: Sequence[Chapter], step: int) -> Chapter:
    """The chapter to which a step belongs. Steps up to the fork belong to the parent."""
    return next(c for c in history if c.last_step is None or step <= c.last_step)


class VerifyPlan(msgspec.Struct, frozen=True):
    """The steps to train again: those after `from_step` up to `to_step`, from `checkpoint` (None is the pretrained model).
    `run` is the state at the last compared step; its spec holds for all compared steps. `losses` are earlier ones, for the
    trainer's spike detection. `held` are the devices of living attempts. `model` is the log's record of the model folder."""

    run: Run
    from_step: int
    to_step: int
    checkpoint: CheckpointInfo | None
    log: dict[int, LoggedStep]
    losses: list[float]
    held: list[str]
    model: ModelRecord

    @property
    def count(self) -> int:
        """The number of compared steps."""
        return self.to_step - self.from_step


def plan(
    store: Store, prefix: str, from_step: int | None = None, to_step: int | None = None, *, host: str = ""
) -> VerifyPlan:
    """Choose the steps to train again. `from_step` defaults to the timeline's oldest checkpoint with steps after it, `to_step`
    to its last step. `host` is the host whose devices are used.

    Raises `RunNotFound`, `AmbiguousRun`, or `Refused` if there is no step to compare or no checkpoint to start from.
    """
    with store.read() as connection:
        run = load_run(connection, resolve_id(connection, prefix))
        recorded = list(event_store.read_stream(connection, run.run_id))
        devices = list(_held(connection, host))
    log = logged_steps(recorded)
    if not log:
        fix = "resume it first" if run.status in ENDED else "wait until it has"
        raise Refused(Problem(run.run_id, f"is {run.status} and has recorded no step", fix))
    last = max(log)
    if to_step is not None and to_step not in log:
        what = f"step {to_step} is not in the timeline"
        fix = f"its own steps are {min(log)} to {last}"
        raise Refused(Problem("--to-step", what, fix))
    end = last if to_step is None else to_step
    usable = {c.step: c for c in run.checkpoints if not (c.superseded or c.weights_only) and c.step < end}
    begin = _begin(run, usable, from_step, end)
    past = recorded[: log[end].version]
    losses = losses_before((r.event for r in past), begin)
    then = fold(Run(run.run_id), past)
    model = record_of(r.event for r in recorded)
    return VerifyPlan(then, begin, end, usable.get(begin), log, losses, devices, model)


def _begin(run: Run, usable: dict[int, CheckpointInfo], from_step: int | None, end: int) -> int:
    """The step to start from: one with a checkpoint on this host, or 0 for the pretrained model."""
    # A fork from a checkpoint has no steps of its own before it.
    pretrained = {0} if run.first_step == 0 else set()
    present = {step for step, c in usable.items() if Path(c.path).is_dir()}
    if from_step is None:
        if not present | pretrained:
            what = f"no checkpoint before step {end} is on this host"
            raise Refused(Problem(run.run_id, what, "run this command on the host that trained it"))
        return min(present) if present else 0
    if from_step in present | pretrained:
        return from_step
    choices = ", ".join(str(step) for step in sorted(present | pretrained)) or "none"
    if from_step in usable:
        what = f"the checkpoint of step {from_step} is not on this host: {usable[from_step].path}"
    else:
        what = f"{run.run_id} has no checkpoint of step {from_step} in its timeline with steps after it up to {end}"
    raise Refused(Problem("--from-step", what, f"one of: {choices}"))


def held(store: Store, host: str) -> list[str]:
    """The devices of the living attempts on a host."""
    with store.read() as connection:
        return list(_held(connection, host))


def _held(connection: sa.Connection, host: str) -> Iterator[str]:
    for lease in leases.leases(connection):
        launches = event_store.read_stream(connection, lease.run_id, types=("AttemptLaunched",))
        for r in launches:
            if isinstance(r.event, e.AttemptLaunched) and r.attempt == lease.attempt and r.event.host == host:
                yield from r.event.devices


def record(store: Store, context: Context, run_id: str, verdict: e.ReplayVerified | e.ReplayDiverged) -> None:
    """Append the result of a comparison to the run's stream."""
    with store.write() as tx:
        run = current(tx.connection, run_id)
        append_decided(tx, context, run_id, run.version, [verdict])
