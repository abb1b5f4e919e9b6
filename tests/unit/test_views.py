"""Every column of the SQL views, as the log of one run makes it."""

from __future__ import annotations

import msgspec

from sftd.domain import events as e
from sftd.domain.evolve import fold
from sftd.domain.run import Run
from sftd.domain.spec import Spec
from sftd.domain.spec_sections import Checkpoint, Trainer
from sftd.projections import views
from tests.contract.test_operations import step

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


def run() -> Run:
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
        for n, event in enumerate(HISTORY, 1)
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
