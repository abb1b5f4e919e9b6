"""Forks, changed resumes and the collection of checkpoints on a real database, with real folders."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from sftd.domain.errors import LeaseLost, Refused
from sftd.domain.log import events as e
from sftd.domain.log.model_record import ModelRecord
from sftd.domain.model.files import ModelFile, ModelFiles
from sftd.domain.run.state import Run
from sftd.domain.spec.parse import change
from sftd.operations.commands import gc, lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts, checkpoints
from sftd.operations.driving.attempts import Claimed
from sftd.operations.queries import forks, model_files
from sftd.operations.queries import runs as run_queries
from sftd.store.database.engine import Store
from sftd.store.queue import order as queue_order
from sftd.wire import preflight
from sftd.wire.attempt.journal import Line
from sftd.wire.checkpoint.directory import MANIFEST
from sftd.wire.checkpoint.directory import reading as held
from tests.builders.log.attempts import claim, end
from tests.builders.log.clock import Clock
from tests.builders.log.direct_folders import Folder, take_in
from tests.builders.log.histories import step
from tests.builders.log.specs import LEASE, SPEC, found

RESOLVED, _ = change(SPEC, [])


def train(log: Store, clock: Clock, claimed: Claimed, folder: Path, first: int, last: int) -> None:
    """Steps, each with a published checkpoint that has a manifest."""
    lines: list[e.Event] = []
    for number in range(first, last + 1):
        path = folder / f"step-{number:08d}"
        path.mkdir(parents=True, exist_ok=True)
        manifest = {"run_id": claimed.run.run_id, "layout": {"tp": 2, "pp": 1}, "dtype": "float32"}
        (path / MANIFEST).write_text(json.dumps(manifest))
        publish = e.CheckpointPublished(
            step=number, path=str(path), bytes=1, manifest_digest=f"m{number}", seconds=0.1
        )
        lines += [step(number), publish]
    attempts.record(
        log,
        clock.context,
        claimed.lease,
        [Line(number=n, occurred_at=n, event=line) for n, line in enumerate(lines, 1)],
        100,
        {},
    )


@pytest.fixture
def parent(log: Store, clock: Clock, tmp_path: Path) -> Run:
    """A run of three steps that has succeeded, each of them with a checkpoint."""
    submit_all(log, clock.context, [Wish(RESOLVED, found(3))], "ada")
    claimed = claim(log, clock)
    train(log, clock, claimed, tmp_path / "parent", 1, 3)
    return end(log, clock, claimed, 0)


def fork(log: Store, clock: Clock, parent: Run, step: int | None, *overrides: tuple[str, object]) -> str:
    spec, _ = change(parent.spec, [("trainer.max_steps", 6), *overrides])
    return lifecycle.fork(log, clock.context, parent.run_id, step, spec, found(6), [], "bob")


def test_a_fork_and_its_pin_are_one_transaction(log: Store, clock: Clock, parent: Run) -> None:
    name = fork(log, clock, parent, 2, ("optimizer.lr", 0.5))
    mine, pins = run_queries.run_events(log, name), run_queries.run_events(log, parent.run_id, parent.version)
    assert [r.type for r in mine] == ["RunForked", "RunSubmitted"]
    assert [r.event for r in pins] == [e.CheckpointPinned(step=2, fork=name)]
    assert mine[1].position + 1 == pins[0].position
    assert isinstance(mine[0].event, e.RunForked)
    assert mine[0].event.changes == {"trainer.max_steps": [3, 6], "optimizer.lr": [1e-5, 0.5]}
    claimed = claim(log, clock)
    assert (claimed.run.run_id, claimed.start.from_step) == (name, 2)
    start = claimed.run.restart_checkpoint
    assert start is not None
    assert (claimed.start.checkpoint, start.path, start.manifest_digest) == (
        start.path,
        mine[0].event.checkpoint,
        "m2",
    )
    before = log.schema_revision(), [row.run_id for row in run_queries.list_runs(log)]
    with pytest.raises(Refused):
        fork(log, clock, parent, 9)
    assert before == (log.schema_revision(), [row.run_id for row in run_queries.list_runs(log)])
    assert run_queries.find_run(log, parent.run_id).version == parent.version + 1


def test_the_tree_holds_every_generation(log: Store, clock: Clock, parent: Run) -> None:
    submit_all(log, clock.context, [Wish(RESOLVED, found(3))], "ada")  # no relative
    one = fork(log, clock, parent, 2)
    two = fork(log, clock, parent, 1)
    three = fork(log, clock, run_queries.find_run(log, one), 2, ("optimizer.lr", 0.25))
    for asked in (parent.run_id, one, two, three):
        run_id, root = forks.lineage(log, asked)
        assert run_id == asked
        assert (root.run_id, root.parent, root.status) == (parent.run_id, None, "succeeded")
        assert [(m.run_id, m.forked_at) for m in root.forks] == [(two, 1), (one, 2)]
        [grandchild] = root.forks[1].forks
        assert (grandchild.run_id, grandchild.parent, grandchild.changes) == (
            three,
            one,
            {"optimizer.lr": [1e-5, 0.25]},
        )


def test_a_resume_with_another_spec_goes_on_with_it(log: Store, clock: Clock, parent: Run) -> None:
    spec, _ = change(
        parent.spec, [("trainer.max_steps", 5), ("launch.priority", 7), ("scheduler.type", "constant")]
    )
    with pytest.raises(Refused, match=r"scheduler.type"):
        lifecycle.resume(
            log, clock.context, parent.run_id, "bob", None, preflight.proposal(spec, found(5)), "fork"
        )
    spec, _ = change(parent.spec, [("launch.priority", 7), ("checkpoint.keep_last", 1)])
    run = lifecycle.resume(log, clock.context, parent.run_id, "bob", 2, preflight.proposal(spec, found(3)))
    assert (run.status, run.spec, run.planned_steps) == ("queued", spec, 3)
    submit_all(log, clock.context, [Wish(RESOLVED, found(3))], "ada")
    assert claim(log, clock).run.run_id == parent.run_id, "its priority is that of the new spec"


def test_collecting_keeps_readers_and_forks(
    log: Store, clock: Clock, parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parent"
    fork(log, clock, parent, 1, ("launch.priority", -1))
    spec, _ = change(parent.spec, [("checkpoint.keep_last", 1)])
    lifecycle.resume(log, clock.context, parent.run_id, "bob", 3, preflight.proposal(spec, found(3)))
    claimed = claim(log, clock)
    assert claimed.run.run_id == parent.run_id
    with pytest.raises(Refused, match="its daemon deletes"):
        gc.leftovers(log, clock.context, [parent.run_id], dry_run=False, home=Path("/nowhere"))
    assert gc.leftovers(log, clock.context, [], dry_run=False, home=Path("/nowhere")) == []
    end(log, clock, claimed, 0)

    def left(*, dry_run: bool) -> list[tuple[int, bool]]:
        return [
            (row.step, row.is_gone)
            for row in gc.leftovers(log, clock.context, [], dry_run=dry_run, home=Path("/nowhere"))
        ]

    with held(folder / "step-00000002"):
        assert left(dry_run=True) == left(dry_run=False) == [(2, False)]
    assert left(dry_run=True) == [(2, True)]
    # A crash right after the deletion was recorded.
    with monkeypatch.context() as crash:
        crash.setattr("sftd.wire.checkpoint.directory.remove", lambda path: None)
        assert left(dry_run=False) == [(2, True)]
    assert (folder / "step-00000002").is_dir()
    assert left(dry_run=False) == []
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000003"]
    rows = {row.step: row for row in checkpoints.overview(log, run_queries.find_run(log, parent.run_id))}
    assert {n: row.status for n, row in rows.items()} == {1: "pinned", 2: "deleted", 3: "published"}
    assert rows[1].layout == {"tp": 2, "pp": 1}
    assert run_queries.run_events(log, parent.run_id, types=("CheckpointDeleted",))[0].event == (
        e.CheckpointDeleted(step=2, path=str(folder / "step-00000002"), bytes=1, reason="retention")
    )


def test_damaged_and_replaced_checkpoints_go_when_the_run_has_succeeded(
    log: Store, clock: Clock, parent: Run, tmp_path: Path
) -> None:
    fork(log, clock, parent, 1, ("launch.priority", -1))
    lifecycle.resume(log, clock.context, parent.run_id, "bob", 3)
    claimed = claim(log, clock)
    damaged = e.CheckpointRejected(
        step=3, path=str(tmp_path / "parent/step-00000003"), reason="a byte was flipped"
    )
    attempts.record(log, clock.context, claimed.lease, [Line(number=1, occurred_at=1, event=damaged)], 9, {})
    end(log, clock, claimed, 1)
    assert gc.leftovers(log, clock.context, [], dry_run=False, home=Path("/nowhere")) == [], (
        "somebody may want to look"
    )
    clock.time += 3600 * 1_000_000
    # From step 2 into another save_dir; then once more from step 1 into a third.
    claimed = claim(log, clock)
    train(log, clock, claimed, tmp_path / "second", 3, 3)
    end(log, clock, claimed, 0)
    lifecycle.resume(log, clock.context, parent.run_id, "bob", 1)
    claimed = claim(log, clock)
    train(log, clock, claimed, tmp_path / "third", 2, 3)
    end(log, clock, claimed, 0)
    elsewhere = "saved elsewhere since"
    left = [
        (row.step, row.what)
        for row in gc.leftovers(log, clock.context, [], dry_run=True, home=Path("/nowhere"))
    ]
    assert left == [(2, elsewhere), (3, "damaged"), (3, elsewhere)]
    gc.leftovers(log, clock.context, [], dry_run=False, home=Path("/nowhere"))
    there = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/step-*"))
    # The fork's start, and what the run's timeline has.
    assert there == ["parent/step-00000001", "third/step-00000002", "third/step-00000003"]
    told = [r.event for r in run_queries.run_events(log, parent.run_id, types=("CheckpointDeleted",))]
    assert e.CheckpointDeleted(step=3, path=damaged.path, bytes=1, reason="rejected") in told
    assert gc.leftovers(log, clock.context, [], dry_run=False, home=Path("/nowhere")) == []


def test_a_daemon_that_lost_the_run_deletes_nothing(
    log: Store, clock: Clock, parent: Run, tmp_path: Path
) -> None:
    spec, _ = change(parent.spec, [("checkpoint.keep_last", 1)])
    lifecycle.resume(log, clock.context, parent.run_id, "bob", 3, preflight.proposal(spec, found(3)))
    lost = claim(log, clock).lease
    # A step more, so that the attempt is no longer starting, and step 1 and 2 may go.
    lines = [Line(number=1, occurred_at=1, event=step(4))]
    attempts.record(log, clock.context, lost, lines, 10, {})
    adopted = e.AttemptAdopted(daemon="other", host="h", pid=1)
    mine = attempts.adopt(log, clock.context, lost, adopted, LEASE)
    with log.read() as connection:
        assert len(checkpoints.collectable(connection, run_queries.find_run(log, parent.run_id))) == 2
    with pytest.raises(LeaseLost):
        checkpoints.collect(log, clock.context, parent.run_id, lost)
    # Nor does one who has no lease while another daemon drives it.
    assert checkpoints.collect(log, clock.context, parent.run_id) == []
    assert len(list((tmp_path / "parent").iterdir())) == 3
    assert [c.step for c in checkpoints.collect(log, clock.context, parent.run_id, mine)] == [1, 2]


def test_what_is_on_another_host_is_left_alone(log: Store, clock: Clock, parent: Run, tmp_path: Path) -> None:
    (tmp_path / "parent").rename(tmp_path / "elsewhere")
    spec, _ = change(parent.spec, [("checkpoint.keep_last", 1)])
    lifecycle.resume(log, clock.context, parent.run_id, "bob", 3, preflight.proposal(spec, found(3)))
    end(log, clock, claim(log, clock), 0)
    assert gc.leftovers(log, clock.context, [], dry_run=False, home=Path("/nowhere")) == []
    run = run_queries.find_run(log, parent.run_id)
    assert [c.step for c in run.checkpoints] == [1, 2, 3]
    assert {row.status for row in checkpoints.overview(log, run)} == {"missing"}
    with pytest.raises(Refused, match="is not on this host"):
        forks.find(log, parent.run_id, 2)


def test_a_direct_run_that_went_on_in_another_layout_is_taken_in_as_that(
    log: Store, clock: Clock, tmp_path: Path
) -> None:
    folder = Folder(tmp_path / "run")
    folder.attempt(step(1), folder.published(1), exit_code=0, stop=True)
    take_in(log, folder)
    name = fork(log, clock, run_queries.find_run(log, "brave"), 1)
    folder.attempt(step(2), step(3), folder.published(3), exit_code=0, resumed=1)
    order = folder.run.attempt(2).order()
    changed, _ = change(order.spec, [("model.megatron.tensor_model_parallel_size", 2)])
    text = msgspec.json.encode(msgspec.structs.replace(order, spec=changed))
    folder.run.attempt(2).order_file.write_bytes(text)
    run = take_in(log, folder).run
    assert (run.status, run.spec, run.spec.nproc_per_node) == ("succeeded", changed, 2)
    assert [c.forks for c in run.checkpoints] == [(name,), ()]
    [asked] = run_queries.run_events(log, run.run_id, types=("ResumeRequested",))
    assert isinstance(asked.event, e.ResumeRequested)
    assert asked.event.changes["model.megatron.tensor_model_parallel_size"] == [1, 2]
    assert take_in(log, folder).new_events == 0


def test_a_fork_in_the_queue_has_its_own_place(log: Store, clock: Clock, parent: Run) -> None:
    name = fork(log, clock, parent, None, ("launch.priority", 2))
    with log.read() as connection:
        assert [entry.run_id for entry in queue_order.waiting(connection)] == [name]


def test_an_attempt_is_given_the_record_of_the_model_folder(log: Store, clock: Clock) -> None:
    files = ModelFiles(
        {"config.json": ModelFile(21, "a" * 64)},
        {"model.safetensors": ModelFile(99, "b" * 64)},
        {"config.json": {"rope_theta": 1e4, "note": "ä\n'\"", "ids": [1, None, True]}},
    )
    submitted = msgspec.structs.replace(found(3), model_files=files)
    name = submit_all(log, clock.context, [Wish(RESOLVED, submitted)], "ada")[0]
    claimed = claim(log, clock)
    assert claimed.model == ModelRecord(files)
    for number, digest in enumerate(("c" * 64, "d" * 64), 1):
        event = e.WeightsDigested(files={"model.safetensors": digest}, bytes=99, seconds=0.1)
        lines = [Line(number=number, occurred_at=number, event=event)]
        attempts.record(log, clock.context, claimed.lease, lines, 100, {})
    # The first attempt's count: a later one that found others did not train.
    assert model_files.recorded(log, name) == ModelRecord(files, {"model.safetensors": "c" * 64})


def test_a_fork_loads_the_weights_that_its_checkpoint_was_trained_with(
    log: Store, clock: Clock, tmp_path: Path
) -> None:
    """Until it has digested them itself, the log has its parent's digests."""
    files = ModelFiles({}, {"model.safetensors": ModelFile(99, "b" * 64)})
    submitted = msgspec.structs.replace(found(3), model_files=files)
    name = submit_all(log, clock.context, [Wish(RESOLVED, submitted)], "ada")[0]
    claimed = claim(log, clock)
    digested = e.WeightsDigested(files={"model.safetensors": "c" * 64}, bytes=99, seconds=0.1)
    attempts.record(log, clock.context, claimed.lease, [Line(number=1, occurred_at=1, event=digested)], 1, {})
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    published = e.CheckpointPublished(step=1, path=str(folder), bytes=1, manifest_digest="m", seconds=0.1)
    lines = [Line(number=n, occurred_at=n, event=event) for n, event in ((2, step(1)), (3, published))]
    attempts.record(log, clock.context, claimed.lease, lines, 9, {})
    run = end(log, clock, claimed, 1)

    def forked(at: int, weights: str) -> ModelRecord:
        of = ModelFiles({}, {weights: ModelFile(99, "b" * 64)})
        spec, _ = change(run.spec, [("trainer.max_steps", 6)])
        other = msgspec.structs.replace(found(6), model_files=of)
        return model_files.recorded(log, lifecycle.fork(log, clock.context, name, at, spec, other, [], "bob"))

    assert forked(1, "model.safetensors").weights == {"model.safetensors": "c" * 64}
    # The same weights under another name are compared by the sample that submit reads.
    assert forked(1, "other.safetensors").weights == {}
    assert forked(0, "model.safetensors").weights == {}
