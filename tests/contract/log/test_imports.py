"""Taking a direct run's folder into the log: its contents become the history that a daemon would have recorded."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sftd.domain.errors import Refused, UnknownEvent
from sftd.domain.log import events as e
from sftd.operations.commands import import_run, lifecycle
from sftd.operations.driving import attempts
from sftd.operations.queries import runs as run_queries
from sftd.store.database.engine import Store
from sftd.wire.attempt.direct_run import DirectSubmission, read_history
from sftd.wire.checkpoint import manifest
from tests.builders.log.clock import CONTEXT
from tests.builders.log.direct_folders import RUN, Folder, take_in
from tests.builders.log.histories import step
from tests.builders.log.specs import LEASE, SPEC

SECOND = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def types(log: Store) -> list[str]:
    return [r.type for r in run_queries.run_events(log, RUN)]


def test_a_finished_run_succeeds_by_the_completion_contract(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), step(2), step(3), folder.published(3), exit_code=0)
    done = take_in(log, folder)
    assert (done.run.status, done.run.step, done.new_events, done.missing) == ("succeeded", 3, 8, [])
    steps = ["StepCompleted"] * 3
    assert types(log) == [
        "RunSubmitted", "AttemptClaimed", "AttemptLaunched", *steps, "CheckpointPublished", "RunSucceeded",
    ]  # fmt: skip
    found = run_queries.run_events(log, RUN)
    assert [r.occurred_at // SECOND for r in found] == [1, 10, 10, 11, 12, 13, 14, 14]
    assert found[2].event == e.AttemptLaunched(
        pid=4711,
        create_time=1.5,
        host="node1",
        directory=str(folder.run.attempt(1).path),
        argv=["torchrun"],
        devices=["cpu:0"],
    )
    assert [r.actor for r in found] == ["direct:ada"] * 3 + ["trainer"] * 4 + ["direct:ada"]


def test_an_exit_code_of_0_is_not_enough(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), step(2), step(3), exit_code=0)
    run = take_in(log, folder).run
    assert (run.status, run.cause) == ("failed", "incomplete")
    assert "the final checkpoint was not published" in str(run.message)


def test_the_second_time_nothing_is_new(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), folder.published(1), step(2))
    first = take_in(log, folder)
    before = run_queries.raw_events(log, RUN)
    again = take_in(log, folder)
    assert first.new_events == len(before)
    assert again.new_events == 0
    assert again.run == first.run
    assert run_queries.raw_events(log, RUN) == before


def crash_and_rerun(folder: Folder) -> None:
    """The steps of a killed attempt, and of the one that went on from its checkpoint."""
    folder.attempt(step(1), folder.published(1), step(2))
    folder.attempt(step(2), step(3), folder.published(3), resumed=1, exit_code=0)


def test_a_crash_and_a_rerun_are_one_timeline(log: Store, folder: Folder) -> None:
    crash_and_rerun(folder)
    run = take_in(log, folder).run
    assert (run.status, run.attempt, run.step, run.steps_redone, run.anomalies) == ("succeeded", 2, 3, 1, 0)
    assert [c.step for c in run.checkpoints] == [1, 3]
    assert types(log) == [
        *("RunSubmitted", "AttemptClaimed", "AttemptLaunched"),
        *("StepCompleted", "CheckpointPublished", "StepCompleted"),
        *("AttemptLost", "RunFailed", "ResumeRequested", "AttemptClaimed", "AttemptLaunched"),
        *("TrainingResumed", "StepCompleted", "StepCompleted", "CheckpointPublished", "RunSucceeded"),
    ]


def test_what_grows_is_imported_as_if_at_once(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), folder.published(1), step(2))
    assert take_in(log, folder).run.status == "failed"
    folder.attempt(step(2), step(3), folder.published(3), resumed=1, exit_code=0)
    done = take_in(log, folder)
    assert (done.run.status, done.new_events) == ("succeeded", 8)
    grown = [
        (r.event_id, r.event, r.attempt, r.actor, r.causation_id) for r in run_queries.run_events(log, RUN)
    ]
    assert [r[0] for r in grown] == [n.event_id for n in read_history(folder.run, _sub(folder)).events]
    assert len({r[0] for r in grown}) == len(grown)


def _sub(folder: Folder) -> DirectSubmission:
    found = folder.run.submission()
    assert found is not None
    return found


def test_a_redone_step_that_differs_is_an_anomaly(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), folder.published(1), step(2, loss=1.0))
    folder.attempt(step(2, loss=1.5), step(3), folder.published(3), resumed=1, exit_code=0)
    assert take_in(log, folder).run.anomalies == 1
    found = run_queries.run_events(log, RUN)
    at = [r.type for r in found].index("AnomalyDetected")
    assert found[at].causation_id == found[at - 1].event_id
    assert found[at].event.detail["loss"] == {"recorded": 1.0, "redone": 1.5}  # type: ignore[attr-defined]


def test_an_interrupted_run_is_cancelled_and_a_daemon_may_go_on(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), step(2), folder.published(2), exit_code=0, stop=True)
    assert take_in(log, folder).run.status == "cancelled"
    assert types(log)[-2:] == ["StopRequested", "RunCancelled"]
    # It waits for nobody by itself.
    claim = {"daemon": "d", "host": "h", "fits": lambda run: True, "lease_micros": LEASE}
    assert attempts.claim(log, CONTEXT, **claim) is None  # type: ignore[arg-type]
    lifecycle.resume(log, CONTEXT, RUN, "ada")
    claimed = attempts.claim(log, CONTEXT, **claim)  # type: ignore[arg-type]
    assert claimed is not None
    start = claimed.run.restart_checkpoint
    assert start is not None
    assert (claimed.lease.attempt, claimed.start.from_step, start.manifest_digest) == (2, 2, "m2")

    # The folder has nothing new: no reason to refuse. If it continues, too, the two are different histories.
    assert take_in(log, folder).new_events == 0
    folder.attempt(step(3), folder.published(3), resumed=2, exit_code=0)
    before = types(log)
    with pytest.raises(Refused, match="continued both in the log and in its folder"):
        take_in(log, folder)
    assert types(log) == before


def test_an_export_from_the_imported_run_does_not_stand_in_the_way(log: Store, folder: Folder) -> None:
    from sftd.operations.driving import checkpoints

    folder.attempt(step(1), folder.published(1), step(2))
    take_in(log, folder)
    run, found = checkpoints.find(log, "brave", None)
    exported = e.ModelExported(step=found.step, path="/m", bytes=1, digest="x", dtype="float32")
    checkpoints.record_export(log, CONTEXT, run.run_id, exported)
    folder.attempt(step(2), step(3), folder.published(3), resumed=1, exit_code=0)
    assert take_in(log, folder).run.status == "succeeded"
    assert types(log).count("ModelExported") == 1


def test_a_checkpoint_with_a_file_that_nobody_published_is_named(log: Store, folder: Folder) -> None:
    published = folder.published(3)
    path = Path(published.path)
    (path / "a.distcp").write_bytes(b"weights")
    fields = {
        "run_id": RUN,
        "spec_digest": "s",
        "step": 3,
        "tokens_total": 30,
        "samples": 3,
        "dtype": "float32",
    }
    data = manifest.encode(
        manifest.Manifest(
            **fields,  # type: ignore[arg-type]
            schema_version=manifest.WHOLE,
            loss="0x1p0",
            grad_norm="0x1p0",
            layout={},
            versions={},
            files=manifest.describe(path, ["a.distcp"]),
        )
    )
    (path / manifest.NAME).write_bytes(data)
    published = msgspec.structs.replace(published, manifest_digest=manifest.digest(data))
    folder.attempt(step(1), step(2), step(3), published, exit_code=0)
    assert take_in(log, folder).damaged == {}
    (path / "common.pt").write_bytes(b"state")
    assert take_in(log, folder).damaged == {str(path): "common.pt is not in manifest.json"}


def test_why_a_rank_failed_is_told(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), error="NonFiniteLoss: step 2: loss nan, gradient norm nan")
    run = take_in(log, folder).run
    assert (run.status, run.cause) == ("failed", "not a number")
    assert types(log)[-2:] == ["AttemptFailed", "RunFailed"]


def test_a_journal_that_is_damaged_counts_up_to_there(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), step(2))
    with open(folder.run.attempt(1).journal, "ab") as file:
        file.write(b"not an event\n")
    run = take_in(log, folder).run
    assert (run.status, run.cause, run.step, run.anomalies) == ("failed", "crash", 2, 1)
    assert "the journal cannot be read" in str(run.message)


def test_what_a_newer_sftd_wrote_is_not_half_imported(log: Store, folder: Folder) -> None:
    folder.attempt(step(1))
    with open(folder.run.attempt(1).journal, "ab") as file:
        file.write(b'{"t":1,"type":"StepRepeated","v":1,"p":{}}\n')
    with pytest.raises(UnknownEvent, match="a newer sftd wrote it"):
        take_in(log, folder)
    assert types(log) == []


def test_a_torn_last_line_is_dropped(log: Store, folder: Folder) -> None:
    folder.attempt(step(1))
    with open(folder.run.attempt(1).journal, "ab") as file:
        file.write(b'{"t":1,"type":"Step')
    run = take_in(log, folder).run
    assert (run.status, run.cause, run.step, run.anomalies) == ("failed", "lost", 1, 0)


def test_a_run_that_lives_is_refused(log: Store, folder: Folder) -> None:
    folder.attempt(step(1))
    hold = folder.run.hold()
    with pytest.raises(
        Refused, match=r"is being trained or imported at this moment \(attempt 1 has pid 4711 on node1"
    ):
        take_in(log, folder)
    hold.share()
    with pytest.raises(Refused, match="is being trained"):
        take_in(log, folder)
    hold.close()
    assert take_in(log, folder).run.status == "failed"


def test_what_is_no_run_is_refused_and_left_alone(log: Store, tmp_path: Path) -> None:
    for name in ("empty", "none"):
        path = tmp_path / name
        if name == "empty":
            path.mkdir()
        with pytest.raises(Refused, match=r"it has no run\.json"):
            import_run.take_in(log, CONTEXT, str(path))
        assert not list(tmp_path.glob("*/*"))
    (tmp_path / "empty" / "run.json").write_text("{}")
    with pytest.raises(Refused, match="cannot be read"):
        import_run.take_in(log, CONTEXT, str(tmp_path / "empty"))


def test_checkpoints_that_are_gone_are_named(log: Store, folder: Folder) -> None:
    folder.attempt(step(1), folder.published(1), step(2))
    (folder.run.checkpoint_dir / "step-00000001").rmdir()
    assert take_in(log, folder).missing == [str(folder.run.checkpoint_dir / "step-00000001")]


TRUSTING = msgspec.structs.replace(SPEC, model=msgspec.structs.replace(SPEC.model, trust_remote_code=True))


@pytest.mark.parametrize("when", ["from the beginning", "in a later attempt"])
def test_code_of_a_strangers_run_is_let_in_by_the_user_alone(log: Store, tmp_path: Path, when: str) -> None:
    """Its log says that code was allowed, and its log is whatever the stranger wrote."""
    folder = Folder(tmp_path / "run", TRUSTING if when == "from the beginning" else SPEC)
    if when != "from the beginning":
        folder.attempt(step(1), exit_code=1)
        take_in(log, folder)
        folder.spec = TRUSTING
    folder.attempt(step(1), step(2), step(3), folder.published(3), exit_code=0)
    with pytest.raises(Refused, match="--trust-remote-code"):
        take_in(log, folder)
    done = import_run.take_in(log, CONTEXT, str(folder.run.path), trust_remote_code=True)
    assert done.run.spec.model.trust_remote_code
    # Said once: what is new needs no other word.
    assert take_in(log, folder).new_events == 0
