"""Every column of the SQL views, as the log of one run makes it."""

from __future__ import annotations

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run.fold import fold
from sftd.domain.run.state import Replay, Run, Validation
from sftd.domain.spec.sections import Checkpoint, Trainer
from sftd.domain.spec.spec import Spec
from sftd.projections import views
from tests.builders.log.histories import step

SPEC = Spec(trainer=Trainer(project_name="p", experiment_name="n"), checkpoint=Checkpoint(keep_last=1))


def published(number: int) -> e.CheckpointPublished:
    return e.CheckpointPublished(
        step=number, path=f"/c/{number}", bytes=10 * number, manifest_digest=f"m{number}", seconds=1.0
    )


def validated(number: int, loss: float) -> e.ValidationCompleted:
    return e.ValidationCompleted(step=number, loss=loss, tokens=1, rows=1, seconds=1.0)


HISTORY: list[e.Event] = [
    e.RunSubmitted(
        spec=msgspec.to_builtins(SPEC),
        spec_digest="s",
        planned_steps=9,
        user="ada",
        data={},
        model={},
        sftd_version="0",
    ),
    e.AttemptClaimed(daemon="d", host="h", from_step=0),
    step(1, loss=4.0),
    published(1),
    validated(1, 3.0),
    step(2, loss=3.5),
    published(2),
    validated(2, 2.0),
    step(3, loss=0.1),
    published(3),
    validated(3, 2.5),
    e.AnomalyDetected(step=3, what="loss_spike"),
    e.AttemptFailed(cause="killed", message="by a signal", exit_code=1, retry_at=99),
]


def run(*more: e.Event) -> Run:
    recorded = [
        e.Recorded(
            position=n,
            event_id=str(n),
            run_id="r",
            version=n,
            type=type(event).__name__,
            schema_version=1,
            occurred_at=100 * n,
            recorded_at=0,
            attempt=1,
            actor="t",
            causation_id=None,
            event=event,
        )
        for n, event in enumerate([*HISTORY, *more], 1)
    ]
    return fold(Run("r"), recorded)


def test_a_run() -> None:
    found = views.run_row(run())
    assert found.pop("state")
    assert found == {
        "run_id": "r",
        "version": 13,
        "status": "retrying",
        "project": "p",
        "name": "n",
        "user": "ada",
        "submitted_at": 100,
        "started_at": 200,
        "ended_at": None,
        "updated_at": 1300,
        "attempt": 1,
        "step": 3,
        "planned_steps": 9,
        "loss": "0.1",
        # The last, not the best.
        "val_loss": "2.5",
        "seconds_per_step": 1.0,
        "anomalies": 1,
        "message": "killed: by a signal",
    }


def test_its_checkpoints() -> None:
    found = views.checkpoint_rows(run())
    assert [(row.pop("step"), row.pop("val_loss"), row.pop("published_at")) for row in found] == [
        (1, "3.0", 400),
        (2, "2.0", 700),
        (3, "2.5", 1000),
    ]
    kept = [row.pop("kept_because") for row in found]
    assert found == [
        {"run_id": "r", "path": f"/c/{n}", "bytes": 10 * n, "manifest_digest": f"m{n}", "superseded": False}
        for n in (1, 2, 3)
    ]
    assert kept == ["", "best", "last"]
    assert views.files_rows(run()) == [{"run_id": "r", "bytes": 60, "removed_at": None}]


def test_a_run_that_goes_back_has_what_its_timeline_has() -> None:
    """Its validations and checkpoints, and the loss of none of the steps that are to be done again."""
    back = e.ResumeRequested(by="ada", from_step=1), e.AttemptClaimed(daemon="d", host="h", from_step=1)
    found = run(*back)
    row = views.run_row(found)
    assert (row["step"], row["loss"], row["val_loss"], row["status"]) == (1, None, "3.0", "starting")
    assert (row["message"], row["ended_at"], row["started_at"]) == (None, None, 200)
    assert [(r["step"], r["superseded"]) for r in views.checkpoint_rows(found)] == [
        (1, False),
        (2, True),
        (3, True),
    ]
    assert (found.first_validation, found.best_validation) == (Validation(1, 3.0), Validation(1, 3.0))


def test_a_checkpoint_has_the_validation_of_its_own_step() -> None:
    found = run(step(4), published(4), validated(5, 1.0))
    assert [row["val_loss"] for row in views.checkpoint_rows(found)] == ["3.0", "2.0", "2.5", None]


def test_the_last_replay_and_where_it_diverged() -> None:
    more = {"from_step": 1, "to_step": 3, "environment": {}, "by": "ada"}
    verified = e.ReplayVerified(is_exact=True, **more)  # type: ignore[arg-type]
    assert run(verified).last_replay == Replay(1, 3, None, 1400)
    diverged = e.ReplayDiverged(step=2, detail={}, **more)  # type: ignore[arg-type]
    assert run(verified, diverged).last_replay == Replay(1, 3, 2, 1500)


def test_weights_alone_are_no_start() -> None:
    """The only whole checkpoint is damaged: training begins with the pretrained model, not with weights of a step."""
    reduced = e.CheckpointReduced(
        step=1, path="/c/1-weights", former_path="/c/1", bytes=5, freed_bytes=5, manifest_digest="w"
    )
    gone = [e.CheckpointRejected(step=number, path=f"/c/{number}", reason="short") for number in (2, 3)]
    found = run(reduced, *gone)
    assert [(c.step, c.path, c.weights_only) for c in found.checkpoints] == [(1, "/c/1-weights", True)]
    assert found.restart_checkpoint is None
