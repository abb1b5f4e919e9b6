"""What the log says for plans, on each database."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
from sftd.domain.log import events as e
from sftd.domain.plan.duration import Machine
from sftd.domain.spec.spec import spec_digest
from sftd.operations.queries import plan, runs
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from tests.builders.log.clock import Clock
from tests.builders.log.specs import SHAPE, SPEC

DATA = DataFacts(
    files=["t"],
    digest="",
    rows=100,
    tokens=800,
    trained_tokens=400,
    longest=8,
    truncated=0,
    unusable=0,
    seen_tokens=800,
    seen_squares=6400,
    lengths=(8,) * len(LENGTH_QUANTILES),
)
HERE = Machine(device="cpu", name="cpu", cores=1)


def record(log: Store, run_id: str, at: int, seconds: float, *, device: str = "cpu") -> None:
    """A run of three steps that was submitted at `at` and took so long for each."""
    environment = {"device": device, "dtype": "float32", "threads": 1}
    nothing: dict[str, Any] = dict.fromkeys(
        ("epoch", "loss", "grad_norm", "lr", "tokens_real", "tokens_padded", "samples"), 1
    )
    story: list[e.Event] = [
        e.RunSubmitted(
            spec=msgspec.to_builtins(SPEC),
            spec_digest=spec_digest(SPEC),
            planned_steps=3,
            user="ada",
            data={"train": msgspec.to_builtins(DATA), "val": None},
            model={"path": "m", **msgspec.to_builtins(SHAPE)},
            sftd_version="",
        ),
        e.AttemptClaimed(daemon="d", host="h", from_step=0),
        e.ModelLoaded(
            architecture=SHAPE.architecture,
            parameters=1,
            dtype="float32",
            device=device,
            seconds=1.0,
            environment=environment,
        ),
        *(
            e.StepCompleted(
                step=step,
                tokens=1,
                tokens_total=step,
                samples_digest="",
                seconds=seconds,
                peak_memory_bytes=10**9 + step,
                **nothing,
            )
            for step in (1, 2, 3)
        ),
        e.CheckpointPublished(step=3, path="p", bytes=12, manifest_digest="d", seconds=1.0),
        e.RunSucceeded(steps=3, tokens=3, final_checkpoint="p"),
    ]
    new = [
        e.NewEvent(
            event=event, event_id=f"{run_id}-{n}", occurred_at=at + n * 1_000_000, actor="t", attempt=1
        )
        for n, event in enumerate(story)
    ]
    with log.write() as tx:
        event_store.append(tx, run_id, 0, new, at)


def test_an_outcome_is_read_from_the_log(log: Store) -> None:
    record(log, "first", 10**15, 0.5)
    run = runs.find_run(log, "first")
    found = plan.outcome(log, run, runs.goodput(log, "first", 10**15))
    assert found is not None
    by_name = {one.name: one for one in found.compared}
    # The last step's, which is the highest so far.
    assert by_name["peak memory"].actual == 10**9 + 3
    assert by_name["step"].actual == pytest.approx(0.5)
    assert by_name["checkpoints kept"].actual == 12
    assert found.plan.pace.basis == "assumed"


def test_the_pace_is_that_of_earlier_runs_on_such_a_device(log: Store) -> None:
    assert plan.calibration(log, SHAPE, HERE) is None
    record(log, "first", 10**15, 0.5)
    record(log, "second", 2 * 10**15, 0.5)
    record(log, "on-a-gpu", 3 * 10**15, 9.0, device="NVIDIA H100 80GB HBM3")
    factor = plan.calibration(log, SHAPE, HERE)
    assert factor is not None
    run = runs.find_run(log, "second")
    found = plan.outcome(log, run, runs.goodput(log, "second", 3 * 10**15))
    assert found is not None
    # Not the run itself, nor what came after: what could be known when it was submitted.
    assert found.plan.pace.calibration == pytest.approx(factor)
    assert found.plan.pace.step == pytest.approx(0.5)


def test_a_run_that_never_started_has_no_outcome(log: Store, clock: Clock) -> None:
    from sftd.operations.commands.submit import Wish, submit_all
    from sftd.wire.preflight import Preflight

    run_id = submit_all(log, clock.context, [Wish(SPEC, Preflight(SHAPE, DATA, None, 3, []))], "ada")[0]
    run = runs.find_run(log, run_id)
    assert plan.outcome(log, run, runs.goodput(log, run_id, clock.time)) is None
