"""One history of every kind of run, made by the operations that a daemon calls: what `--json` answers are compared with.

Times are seconds after `World.start`. All numbers of a step differ, so that an exchanged field is seen.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run.failures import Failure
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.parse import change
from sftd.domain.spec.sections import Launch, Trainer
from sftd.domain.spec.spec import Spec
from sftd.operations.commands import hold, lifecycle
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.context import Context
from sftd.operations.driving import attempts
from sftd.operations.driving.attempts import Claimed
from sftd.store.database.engine import Store
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.attempt.journal import Line
from sftd.wire.checkpoint.directory import MANIFEST
from sftd.wire.preflight import Preflight
from tests.builders.log.specs import FACTS, SHAPE

SECOND = 1_000_000
HOUR = 3600 * SECOND
# step → loss, grad_norm, lr, tokens, tokens_real, tokens_padded, seconds, mfu, peak memory
STEPS: dict[int, tuple[float, float, float, int, int, int, float, float, int]] = {
    1: (4.0, 1.5, 1e-5, 8, 16, 20, 2.0, 0.50, 100_000_000),
    2: (3.0, 1.4, 2e-5, 9, 17, 21, 2.5, 0.40, 300_000_000),
    3: (2.5, 1.3, 3e-5, 10, 18, 22, 3.0, 0.30, 300_000_000),
    4: (2.0, 1.2, 4e-5, 11, 19, 23, 2.0, 0.20, 200_000_000),
    5: (2.25, 1.1, 3e-5, 12, 20, 24, 2.0, 0.60, 200_000_000),
    6: (1.75, 1.0, 2e-5, 13, 21, 25, 2.0, 0.70, 250_000_000),
}
ENVIRONMENT: dict[str, Any] = {
    "torch": "2.11",
    "device": "cpu",
    "threads": 1,
    "dtype": "float32",
    "deterministic": True,
    "variables": {"A": "1"},
}


class World:
    """The history in a database, and where its files are."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        # Long enough ago that nothing lies in the future, and recent enough for a back-off to last.
        self.start = time.time_ns() // 1000 - 1000 * SECOND
        self.now = self.start
        self.context = Context(actor="test", now=lambda: self.now)
        self._lines: dict[str, int] = {}
        with store.write(appends=False) as tx:
            for daemon, host, stopped in (("d1", "node-1", False), ("d2", "node-2", True)):
                devices = json.dumps({"gpus": 2, "cpus": 4, "user_limit": 0, "project_limit": 0})
                # Seen in an hour: neither silent nor unseen, however long a test takes.
                row = DaemonRow(daemon, host, 7, 1.0, f"/home/{host}", devices, self.start, self.start + HOUR)
                daemons.register(tx, row)
                if stopped:
                    daemons.stopped(tx, daemon, self.start + 5 * SECOND)
        self.base = self._base()
        self.fork = self._fork()
        self.bad = self._bad()
        self.going = self._going()
        self.held = self._held()
        self.later = self._later()
        self.sweep = "sweep-00ff00"
        self.points = self._points()
        self.again = self._again()

    def at(self, seconds: float) -> int:
        """A time of the history."""
        return self.start + int(seconds * SECOND)

    def spec(self, **trainer: Any) -> Spec:
        spec = Spec(
            model=Model(partial_pretrain="/m"),
            data=Data(train_files=["/t.parquet"]),
            trainer=Trainer(**({"max_steps": 6, "project_name": "geo"} | trainer)),
            launch=Launch(nproc_per_node=2, device="cpu", threads_per_rank=1),
        )
        return change(spec, [])[0]

    def submit(self, at: float, spec: Spec, user: str = "ada", **more: Any) -> str:
        self.now = self.at(at)
        found = Preflight(SHAPE, FACTS, None, spec.trainer.max_steps or 0, [])
        return submit_all(self.store, self.context, [Wish(spec, found)], user, **more)[0]

    def claim(self, at: float, run_id: str, *, lease: int = HOUR) -> Claimed:
        self.now = self.at(at)
        claimed = attempts.claim(
            self.store,
            self.context,
            daemon="d1",
            host="node-1",
            fits=lambda entry: True if entry.run_id == run_id else None,
            lease_micros=lease,
        )
        assert claimed is not None
        self.now = self.at(at + 1)
        launched = e.AttemptLaunched(
            pid=9, create_time=2.0, host="node-1", directory="/a", argv=["x"], devices=["cpu:0", "cpu:1"]
        )
        attempts.launched(self.store, self.context, claimed.lease, launched)
        return claimed

    def record(self, claimed: Claimed, *lines: tuple[float, e.Event]) -> None:
        first = self._lines.get(claimed.lease.token, 0) + 1
        self._lines[claimed.lease.token] = first + len(lines) - 1
        self.now = self.at(lines[-1][0])
        taken = [Line(number=first + n, occurred_at=self.at(t), event=x) for n, (t, x) in enumerate(lines)]
        before = attempts.steps_before(self.store, claimed.lease)
        attempts.record(self.store, self.context, claimed.lease, taken, 100, before)

    def finish(self, at: float, claimed: Claimed, code: int, cause: str = "", backoff: float = 5.0) -> None:
        self.now = self.at(at)
        attempts.finish(
            self.store,
            self.context,
            claimed.lease,
            exit_code=code,
            failure=Failure(cause, f"{cause} it was"),
            lost=False,
            backoff_seconds=backoff,
        )

    def saved(self, run_id: str, step: int) -> e.CheckpointPublished:
        """A checkpoint whose folder has a manifest."""
        path = self.folder / run_id / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / MANIFEST).write_text(json.dumps({"run_id": run_id, "layout": {"tp": 1, "dp": 2}}))
        return e.CheckpointPublished(
            step=step, path=str(path), bytes=1000 * step, manifest_digest=f"m{step}", seconds=2.0
        )

    def _base(self) -> str:
        """Crashes after step 3, continues from step 2, and succeeds."""
        run_id = self.submit(0, self.spec(experiment_name="base"))
        first = self.claim(10, run_id)
        self.record(
            first,
            (15, loaded()),
            (20, step(1)),
            (23, step(2)),
            (24, validated(2, 3.5, 1.0)),
            (25, e.CheckpointStarted(step=2)),
            (27, self.saved(run_id, 2)),
            (30, step(3)),
        )
        self.finish(32, first, 1, "killed")
        second = self.claim(40, run_id)
        path = str(self.folder / run_id / "step-00000002")
        self.record(
            second,
            (45, loaded()),
            (46, e.TrainingResumed(step=2, path=path, tokens_total=17)),
            (50, step(3)),
            (53, step(4)),
            (55, validated(4, 2.5, 1.5)),
            (57, step(5)),
            (60, step(6)),
            (61, validated(6, 2.75, 1.0)),
            (61.5, e.AnomalyDetected(step=6, what="loss_spike", detail={"loss": 9.0, "median": 2.0})),
            (62, e.CheckpointStarted(step=6)),
            (64, self.saved(run_id, 6)),
        )
        self.finish(65, second, 0)
        return run_id

    def _fork(self) -> str:
        self.now = self.at(70)
        spec, _ = change(
            self.spec(experiment_name="fork"), [("optimizer.lr", 5e-4), ("trainer.max_steps", 8)]
        )
        found = Preflight(SHAPE, msgspec.structs.replace(FACTS, digest="e" * 64), None, 8, [])
        return lifecycle.fork(self.store, self.context, self.base, 2, spec, found, [], "bob")

    def _bad(self) -> str:
        """Fails with a cause that no second attempt helps."""
        run_id = self.submit(80, self.spec(experiment_name="bad", project_name="other"), "bob")
        claimed = self.claim(81, run_id)
        odd = msgspec.structs.replace(step(1), loss=float("nan"))
        self.record(claimed, (85, loaded()), (88, odd))
        self.finish(90, claimed, 1, "not a number")
        return run_id

    def _going(self) -> str:
        run_id = self.submit(100, self.spec(experiment_name="going", max_steps=10))
        claimed = self.claim(101, run_id)
        self.record(claimed, (105, loaded()), (108, step(1)), (111, step(2)))
        return run_id

    def _held(self) -> str:
        run_id = self.submit(120, self.spec(experiment_name="held"), "bob")
        self.now = self.at(121)
        hold.hold(self.store, self.context, run_id, "bob", "lunch")
        return run_id

    def _later(self) -> str:
        spec, _ = change(self.spec(experiment_name="later"), [("launch.priority", 3)])
        return self.submit(130, spec, "cy", after=[self.going])

    def _points(self) -> list[str]:
        self.now = self.at(140)
        wishes = [
            Wish(
                change(self.spec(), [("optimizer.lr", lr)])[0],
                Preflight(SHAPE, FACTS, None, 6, []),
                values={"optimizer.lr": lr},
            )
            for lr in (1e-5, 2e-5)
        ]
        return submit_all(self.store, self.context, wishes, "ada", sweep=self.sweep)

    def _again(self) -> str:
        """Waits for its next attempt, for half an hour in which these tests run."""
        run_id = self.submit(150, self.spec(experiment_name="again"))
        claimed = self.claim(151, run_id)
        self.finish(999, claimed, 1, "killed", backoff=500.0)
        return run_id


def step(number: int) -> e.StepCompleted:
    """A step of every run, as the table has it."""
    loss, grad_norm, lr, tokens, real, padded, seconds, mfu, memory = STEPS[number]
    return e.StepCompleted(
        step=number,
        epoch=0,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens=tokens,
        tokens_real=real,
        tokens_padded=padded,
        tokens_total=sum(STEPS[n][3] for n in range(1, number + 1)),
        samples=4,
        samples_digest=f"{number:064x}",
        seconds=seconds,
        mfu=mfu,
        peak_memory_bytes=memory,
        token_accuracy=number / 8,
        entropy=number / 4,
        sources={
            "docs": e.SourceFigures(rows=3, tokens=tokens - 2, loss=loss + 0.5),
            "math": e.SourceFigures(rows=1, tokens=2, loss=loss - 1.0),
        },
    )


def loaded() -> e.ModelLoaded:
    return e.ModelLoaded(
        architecture="a", parameters=1, dtype="float32", device="cpu", seconds=1.0, environment=ENVIRONMENT
    )


def validated(number: int, loss: float, seconds: float) -> e.ValidationCompleted:
    return e.ValidationCompleted(
        step=number, loss=loss, tokens=5, rows=2, seconds=seconds, token_accuracy=0.25, entropy=1.5
    )
