"""What a run keeps on the disk: weights alone after success, removal, and checkpoints that are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa

from sftd.domain.errors import Refused
from sftd.domain.log import events as e
from sftd.domain.run import decisions
from sftd.domain.run.state import Run
from sftd.domain.spec.parse import change
from sftd.domain.spec.spec import Spec
from sftd.operations.commands import gc as gc_checkpoints
from sftd.operations.commands import lifecycle
from sftd.operations.commands import remove as remove_runs
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts, checkpoints, reduce
from sftd.operations.driving.attempts import Claimed
from sftd.operations.queries import runs as run_queries
from sftd.projections import verify, views
from sftd.store.database.engine import Store
from sftd.store.database.tables import view_runs
from sftd.wire import preflight
from sftd.wire.attempt.directory import RunDir
from sftd.wire.attempt.journal import Line
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.checkpoint import manifest
from sftd.wire.checkpoint.manifest import Manifest
from tests.builders.log.attempts import claim, end
from tests.builders.log.clock import Clock
from tests.builders.log.histories import step
from tests.builders.log.specs import SPEC, found
from tests.builders.log.view_rows import view_rows


def save(folder: Path, run_id: str, number: int) -> e.CheckpointPublished:
    """A checkpoint as the trainer writes it: 100 bytes of weights, 200 of training state."""
    path = folder / f"step-{number:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"w" * 100)
    (path / "__0_state_0.distcp").write_bytes(b"s" * 200)
    data = manifest.encode(
        Manifest(
            schema_version=manifest.WHOLE,
            run_id=run_id,
            spec_digest="s",
            step=number,
            tokens_total=10 * number,
            samples=number,
            loss="0x1p0",
            grad_norm="0x1p0",
            layout={},
            dtype="float32",
            versions={},
            files=manifest.describe(path, manifest.list_files(path)),
            state_files=["__0_state_0.distcp"],
        )
    )
    (path / manifest.NAME).write_bytes(data)
    digest = manifest.digest(data)
    return e.CheckpointPublished(
        step=number, path=str(path), bytes=300 + len(data), manifest_digest=digest, seconds=0.1
    )


class Home:
    """Where runs of three steps are trained; the second validates best."""

    def __init__(self, log: Store, clock: Clock, path: Path) -> None:
        self.log, self.clock, self.path = log, clock, path

    def train(self, *overrides: tuple[str, object], name: str | None = None) -> Run:
        """Submit, or with `name` resume, and train to the end."""
        spec: Spec
        spec, _ = change(SPEC, [("checkpoint.keep_last", 1), *overrides])
        if name is None:
            submit_all(self.log, self.clock.context, [Wish(spec, found(3))], "ada")
        claimed = claim(self.log, self.clock)
        run_id = claimed.run.run_id
        folder = RunDir(self.path, run_id).checkpoint_dir("")
        lines: list[e.Event] = []
        for number, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            if (path := folder / f"step-{number:08d}").exists():
                shutil.rmtree(path)
            validated = e.ValidationCompleted(step=number, loss=loss, tokens=1, rows=1, seconds=0.1)
            lines += [step(number), validated, save(folder, run_id, number)]
        taken = [Line(number=n, occurred_at=n, event=line) for n, line in enumerate(lines, 1)]
        attempts.record(self.log, self.clock.context, claimed.lease, taken, 100, {})
        return end(self.log, self.clock, claimed, 0)

    def gc(self, *run_ids: str, dry_run: bool = False, everything: bool = False) -> list[tuple[int, str]]:
        left = gc_checkpoints.leftovers(
            self.log,
            self.clock.context,
            run_ids,
            dry_run=dry_run,
            home=self.path,
            everything=everything,
        )
        return [(row.step, row.what) for row in left]

    def there(self, run: Run) -> list[str]:
        folder = RunDir(self.path, run.run_id).checkpoint_dir("")
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def now(self, run: Run) -> Run:
        return run_queries.find_run(self.log, run.run_id)


@pytest.fixture
def home(log: Store, clock: Clock, tmp_path: Path) -> Home:
    return Home(log, clock, tmp_path / "home")


def test_after_success_the_best_keeps_its_weights_and_the_final_one_stays_whole(home: Home) -> None:
    run = home.train()
    assert home.gc(dry_run=True) == [(1, "not kept"), (2, "weights kept")]
    assert home.there(run) == ["step-00000001", "step-00000002", "step-00000003"]
    assert home.gc() == [(1, "not kept"), (2, "weights kept")]
    assert home.gc() == []
    assert home.there(run) == ["step-00000002.weights", "step-00000003"]
    best = home.now(run).checkpoints[0]
    assert (best.step, best.weights_only, best.val_loss) == (2, True, 1.0)
    assert manifest.verify(Path(best.path), best.manifest_digest).weights_only
    (reduced,) = run_queries.run_events(home.log, run.run_id, types=("CheckpointReduced",))
    assert isinstance(reduced.event, e.CheckpointReduced)
    assert reduced.event.freed_bytes == 200
    rows = {row.step: row.status for row in checkpoints.overview(home.log, home.now(run))}
    assert rows == {1: "deleted", 2: "weights", 3: "published"}
    # The final one can be continued; nothing starts from the other.
    with pytest.raises(Refused, match="weights only"):
        lifecycle.resume(home.log, home.clock.context, run.run_id, "ada", 2)
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    with pytest.raises(Refused, match="weights only"):
        lifecycle.fork(home.log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
    assert lifecycle.fork(home.log, home.clock.context, run.run_id, 3, spec, found(6), [], "ada")


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ("all", ["step-00000002", "step-00000003"]),
        ("weights", ["step-00000002.weights", "step-00000003.weights"]),
    ],
)
def test_all_or_nothing_stays_whole_on_request(home: Home, choice: str, left: list[str]) -> None:
    run = home.train(("checkpoint.after_success", choice))
    home.gc()
    assert home.there(run) == left
    if choice == "weights":
        longer, _ = change(run.spec, [("trainer.max_steps", 6), ("scheduler.type", "constant")])
        with pytest.raises(Refused, match="weights only"):
            lifecycle.fork(home.log, home.clock.context, run.run_id, None, longer, found(6), [], "ada")


def test_a_forks_parent_and_what_is_read_stay_whole(home: Home) -> None:
    run = home.train()
    with checkpoint_dir.reading(Path(run.checkpoints[1].path)):
        assert home.gc()[-1] == (2, "left: it is being read")
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    lifecycle.fork(home.log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
    assert home.gc(run.run_id) == []
    assert "step-00000002" in home.there(run)


def test_a_checkpoint_that_a_fork_starts_from_is_not_reduced_to_its_weights(home: Home) -> None:
    run = home.train(("checkpoint.after_success", "weights"))
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    lifecycle.fork(home.log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
    home.gc()
    assert home.there(run) == ["step-00000002", "step-00000003.weights"]


def test_a_checkpoint_of_an_older_sftd_stays_whole(home: Home) -> None:
    run = home.train()
    path = Path(run.checkpoints[1].path)
    whole = manifest.read(path, None)
    (path / manifest.NAME).write_bytes(
        manifest.encode(
            manifest.Manifest(
                **{name: getattr(whole, name) for name in whole.__struct_fields__ if name != "state_files"}
            )
        )
    )
    assert home.gc() == [(1, "not kept")]


@pytest.mark.parametrize("when", ["made", "recorded"])
def test_a_crash_while_reducing_leaves_the_checkpoint_that_the_log_names(
    home: Home, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run = home.train()

    class Crash(Exception):
        pass

    def crash(*arguments: object) -> None:
        raise Crash

    with monkeypatch.context() as killed:
        target = "append_decided" if when == "made" else "checkpoint_dir.remove"
        killed.setattr(f"sftd.operations.driving.reduce.{target}", crash)
        with pytest.raises(Crash):
            reduce.reduce(home.log, home.clock.context, run.run_id)
    named = home.now(run).checkpoints[1]
    assert named.weights_only == (when == "recorded")
    manifest.verify(Path(named.path), named.manifest_digest)
    assert {"step-00000002", "step-00000002.weights"} <= set(home.there(run))
    home.gc()
    assert home.there(run) == ["step-00000002.weights", "step-00000003"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_gc_beside_a_reduction_loses_no_checkpoint(
    home: Home, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Once before the weights are held, once after: the log names a folder that is whole either way."""
    run = home.train()
    name = "checkpoint_dir.reading" if when == "before" else "current"
    held = checkpoint_dir.reading if when == "before" else reduce.current

    def swept(*arguments: object) -> object:
        checkpoints.sweep(home.log, run.run_id)
        return held(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as beside:
        beside.setattr(f"sftd.operations.driving.reduce.{name}", swept)
        done = reduce.reduce(home.log, home.clock.context, run.run_id)
    assert len(done) == (when == "after")
    best = home.now(run).checkpoints[1]
    assert manifest.verify(Path(best.path), best.manifest_digest).weights_only == (when == "after")


def test_steps_that_are_redone_replace_the_weights(home: Home) -> None:
    run = home.train()
    home.gc()
    lifecycle.resume(home.log, home.clock.context, run.run_id, "ada", 0)
    run = home.train(name=run.run_id)
    assert [(c.step, c.weights_only) for c in run.checkpoints] == [(1, False), (2, False), (3, False)]
    assert (2, "saved elsewhere since") in home.gc()
    assert home.there(run) == ["step-00000002.weights", "step-00000003"]


def test_a_removed_run_leaves_its_events_alone(home: Home, log: Store) -> None:
    kept, run = home.train(), home.train()
    (RunDir(home.path, run.run_id).path / "attempt-0001").mkdir()
    size = {row.run_id: row.bytes for row in run_queries.list_runs(log)}
    assert size[run.run_id] == run.checkpoint_bytes > 900
    freed = remove_runs.remove(log, home.clock.context, home.path, run.run_id, "ada")
    assert freed == run.checkpoint_bytes
    assert not RunDir(home.path, run.run_id).path.exists()
    assert [row.run_id for row in run_queries.list_runs(log)] == [kept.run_id]
    (row,) = run_queries.list_runs(log, run_queries.Filter(removed=True))
    assert (row.run_id, row.status, row.bytes) == (run.run_id, "succeeded", 0)
    types = [r.type for r in run_queries.run_events(log, run.run_id)]
    assert types[-4:] == ["CheckpointDeleted"] * 3 + ["RunRemoved"]
    for again in (
        lambda: remove_runs.belongings(log, home.path, run.run_id, by="ada"),
        lambda: lifecycle.resume(log, home.clock.context, run.run_id, "ada", 0),
        lambda: checkpoints.find(log, run.run_id, None),
        lambda: decisions.fork_point(home.now(run), None),
    ):
        with pytest.raises(Refused, match="was removed"):
            again()
    assert decisions.fork_point(home.now(run), 0) is None, "the pretrained model is still there"
    assert verify.check_log(log, lambda *_: None).problems == []
    before = view_rows(log.engine.url)
    views.rebuild(log)
    assert view_rows(log.engine.url) == before


def test_a_removal_is_refused_while_something_needs_the_run(home: Home, log: Store) -> None:
    run = home.train()

    def remove(run_id: str) -> int:
        return remove_runs.remove(log, home.clock.context, home.path, run_id, "ada")

    with checkpoint_dir.reading(Path(run.checkpoints[0].path)), pytest.raises(Refused, match="is being read"):
        remove(run.run_id)
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    name = lifecycle.fork(log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
    with pytest.raises(Refused, match=f"is where {name} starts"):
        remove(run.run_id)
    with pytest.raises(Refused, match="sftd cancel"):
        remove(name)
    assert len(home.there(run)) == 3
    lifecycle.cancel(log, home.clock.context, name, "ada")
    remove(name)
    assert home.there(run) == ["step-00000001", "step-00000002", "step-00000003"], "they are the parent's"
    assert [c.forks for c in home.now(run).checkpoints] == [(), (), ()]
    with pytest.raises(Refused, match="was removed"):
        # The parent does not keep its start any more.
        lifecycle.fork(log, home.clock.context, name, 2, spec, found(6), [], "ada")
    remove(run.run_id)
    assert not RunDir(home.path, run.run_id).path.exists()


def test_a_fork_that_rejected_its_start_does_not_keep_its_parent(home: Home, log: Store) -> None:
    run = home.train()
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    name = lifecycle.fork(log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
    claimed = claim(log, home.clock)
    damaged = e.CheckpointRejected(step=2, path=run.checkpoints[1].path, reason="bit rot")
    line = Line(number=1, occurred_at=1, event=damaged)
    attempts.record(log, home.clock.context, claimed.lease, [line], 100, {})
    assert end(log, home.clock, claimed, 1).status == "failed"
    remove_runs.remove(log, home.clock.context, home.path, name, "ada")
    remove_runs.remove(log, home.clock.context, home.path, run.run_id, "ada")
    assert not RunDir(home.path, run.run_id).path.exists()


def test_a_removal_that_a_crash_interrupted_is_finished(
    home: Home, log: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = home.train()
    with monkeypatch.context() as killed:
        killed.setattr("sftd.operations.commands.remove._delete", lambda found: None)
        remove_runs.remove(log, home.clock.context, home.path, run.run_id, "ada")
    assert len(home.there(run)) == 3
    home.gc()
    assert not RunDir(home.path, run.run_id).path.exists()


def test_all_checkpoints_of_a_run_can_be_deleted_but_those_of_forks(home: Home, log: Store) -> None:
    run = home.train()
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    name = lifecycle.fork(log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
    with pytest.raises(Refused, match="is queued"):
        home.gc(name, everything=True)
    wanted = [(1, "not kept"), (3, "asked for")]
    assert home.gc(run.run_id, dry_run=True, everything=True) == wanted
    assert home.gc(run.run_id, everything=True) == wanted
    assert home.there(run) == ["step-00000002"]


def test_a_resume_from_a_checkpoint_that_is_gone_is_refused_where_it_would_be(home: Home, log: Store) -> None:
    run = home.train(("checkpoint.keep_last", 3), ("scheduler.type", "constant"))
    shutil.rmtree(run.checkpoints[1].path)
    (Path(run.checkpoints[2].path) / manifest.NAME).unlink()

    def resume(step: int | None, host: str, proposal: preflight.Proposal | None = None) -> Run:
        return lifecycle.resume(log, home.clock.context, run.run_id, "ada", step, proposal, host=host)

    with pytest.raises(Refused, match=r"gone from the disk\n.*use one of 0, 1"):
        resume(2, "h")
    with pytest.raises(Refused, match="no steps are left"):
        resume(None, "h")
    assert home.now(run).status == "succeeded"
    rows = {row.step: row.status for row in checkpoints.overview(log, home.now(run))}
    assert rows == {1: "published", 2: "missing", 3: "missing"}
    longer, _ = change(run.spec, [("trainer.max_steps", 6)])
    again = resume(None, "h", preflight.proposal(longer, found(6)))
    assert (again.resume_from, again.restart_checkpoint) == (1, run.checkpoints[0])


def test_another_host_does_not_know_what_is_gone(home: Home, log: Store) -> None:
    run = home.train(("checkpoint.keep_last", 3))
    shutil.rmtree(run.checkpoints[1].path)
    assert lifecycle.resume(log, home.clock.context, run.run_id, "ada", 2, host="elsewhere").resume_from == 2


def test_views_of_before_have_sizes_after_an_upgrade(home: Home, log: Store) -> None:
    run = home.train()
    with log.write(appends=False) as tx:
        # As an older sftd stored it.
        state = sa.func.replace(view_runs.c.state, ',"weights_only":false', "")
        state = sa.func.replace(state, '"removed_at":null,', "")
        state = sa.func.replace(state, '"after_success":"last",', "")
        tx.execute(sa.update(view_runs).values(state=state))
    assert home.now(run) == run
    assert verify.check_log(log, lambda *_: None).problems == []


def unkept(home: Home) -> tuple[Claimed, list[Path]]:
    """A run that trains, and the checkpoints of its first two steps: nothing keeps them."""
    spec, _ = change(SPEC, [("checkpoint.keep_last", 1), ("checkpoint.keep_best", 0)])
    run_id = submit_all(home.log, home.clock.context, [Wish(spec, found(3))], "ada")[0]
    claimed = claim(home.log, home.clock)
    folder = RunDir(home.path, run_id).checkpoint_dir("")
    told = [event for number in (1, 2, 3) for event in (step(number), save(folder, run_id, number))]
    lines = [Line(number=n, occurred_at=n, event=event) for n, event in enumerate(told, 1)]
    attempts.record(home.log, home.clock.context, claimed.lease, lines, 100, {})
    return claimed, [folder / f"step-{number:08d}" for number in (1, 2)]


def test_what_is_read_is_neither_deleted_nor_said_to_be(home: Home) -> None:
    claimed, (first, second) = unkept(home)
    with checkpoint_dir.reading(first):
        gone = checkpoints.collect(home.log, home.clock.context, claimed.run.run_id, claimed.lease)
        assert [deleted.path for deleted in gone] == [str(second)]
        assert first.exists()
    assert [c.step for c in home.now(claimed.run).checkpoints] == [1, 3]


def test_of_a_run_that_trains_its_own_daemon_alone_deletes(home: Home) -> None:
    """Another command does not know which checkpoint the attempt is about to load or to replace."""
    claimed, unread = unkept(home)
    run_id = claimed.run.run_id
    replacing = unread[0].with_name("step-00000003.replaced")
    replacing.mkdir()
    assert checkpoints.collect(home.log, home.clock.context, run_id) == []
    assert home.gc() == []
    for everything in (False, True):
        with pytest.raises(Refused, match="is running"):
            home.gc(run_id, everything=everything)
    assert all(path.exists() for path in (*unread, replacing))
    gone = checkpoints.collect(home.log, home.clock.context, run_id, claimed.lease)
    assert [deleted.path for deleted in gone] == [str(path) for path in unread]
    assert not any(path.exists() for path in unread)


def test_nothing_is_deleted_before_the_log_says_so(home: Home) -> None:
    claimed, unread = unkept(home)

    def fail(*_: object) -> None:
        raise OSError("no room for the transaction")

    full = Store(home.log.engine, before_commit=(views.catch_up, fail))
    with pytest.raises(OSError, match="no room"):
        checkpoints.collect(full, home.clock.context, claimed.run.run_id, claimed.lease)
    assert all(path.exists() for path in unread)
    assert [c.step for c in home.now(claimed.run).checkpoints] == [1, 2, 3]


def test_a_fork_that_comes_while_a_checkpoint_is_reduced_has_it_whole(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = home.train()
    spec, _ = change(run.spec, [("trainer.max_steps", 6)])
    held = checkpoint_dir.reading

    def forked(*arguments: Path) -> object:
        lifecycle.fork(home.log, home.clock.context, run.run_id, 2, spec, found(6), [], "ada")
        return held(*arguments)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(checkpoint_dir, "reading", forked)
        assert reduce.reduce(home.log, home.clock.context, run.run_id) == []
    best = home.now(run).checkpoints[1]
    assert not manifest.verify(Path(best.path), best.manifest_digest).weights_only
    assert "step-00000002.weights" not in home.there(run)


def test_a_checkpoint_that_is_damaged_is_not_reduced(home: Home) -> None:
    """A person who looks at the damage finds the whole folder."""
    run = home.train()
    (Path(run.checkpoints[1].path) / "__0_0.distcp").write_bytes(b"w" * 99)
    assert reduce.reduce(home.log, home.clock.context, run.run_id) == []
    assert "step-00000002" in home.there(run)
