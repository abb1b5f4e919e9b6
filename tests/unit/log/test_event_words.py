"""What `sftd events`, `show` and `watch` say of each type of event: the numbers that the event holds, and no stronger claim."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sftd.cli.demo.view import LiveSteps
from sftd.cli.terminal.output import summary
from sftd.domain.log import events as e
from sftd.domain.log.events.base import OfStep

GPU = e.GpuSample(
    index=3,
    utilization_percent=97.4,
    memory_used_bytes=5 * 2**30,
    memory_total_bytes=80 * 2**30,
    power_watts=300.0,
)
PROOF: dict[str, Any] = {
    "step": 7,
    "path": "/m",
    "digest": "x",
    "rows": 1,
    "positions": 9,
    "tolerance": 1e-3,
    "versions": {},
}
SAID: list[tuple[e.Event, str]] = [
    (
        e.RunSubmitted(
            spec={},
            spec_digest="0123456789abcdef",
            planned_steps=1200,
            user="ada",
            data={},
            model={},
            sftd_version="1",
        ),
        "1,200 steps, spec 0123456789ab, by ada",
    ),
    (
        e.RunForked(
            parent="brave-otter",
            step=4,
            sample=16,
            checkpoint="/c",
            manifest_digest="m",
            bytes=1,
            tokens_total=9,
            changes={"optimizer.lr": [1e-5, 5e-6]},
            by="bob",
        ),
        "from step 4 of brave-otter, by bob; optimizer.lr: 1e-05 → 5e-06",
    ),
    (e.CheckpointPinned(step=4, fork="calm-fox"), "step 4, from which calm-fox was forked"),
    (
        e.CheckpointUnpinned(step=4, fork="calm-fox"),
        "step 4: calm-fox, which was forked from it, is removed",
    ),
    (e.AttemptClaimed(daemon="d1", host="h", from_step=0), "from the pretrained model, by d1"),
    (e.AttemptClaimed(daemon="d1", host="h", from_step=4), "from step 4, by d1"),
    (
        e.AttemptLaunched(
            pid=9, create_time=1.0, host="h", directory="/a", argv=[], devices=["cuda:0", "cuda:1"]
        ),
        "pid 9 on h, cuda:0, cuda:1",
    ),
    (
        e.AttemptLaunched(pid=0, create_time=1.0, host="h", directory="/a", argv=[], devices=["slurm:3"]),
        "handed to Slurm on h",
    ),
    (e.AttemptAdopted(daemon="d2", host="h", pid=9), "pid 9, by d2"),
    (
        e.ModelLoaded(
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
            dtype="bfloat16",
            device="NVIDIA H100",
            seconds=2.25,
            environment={},
        ),
        "LlamaForCausalLM, 134.5 M parameters, bfloat16 on NVIDIA H100, 2.2 s",
    ),
    (
        e.WeightsDigested(files={"a": "1", "b": "2"}, bytes=2_000_000, seconds=1.5),
        "2 files, 2.0 MB, 1.5 s",
    ),
    (
        e.DataBound(
            train_rows=10,
            train_digest="t",
            val_rows=2,
            val_digest="v",
            truncated_rows=3,
            dropped_rows=1,
            steps_per_epoch=2.5,
            planned_steps=9,
        ),
        "10 rows, 2 for validation, 3 truncated, 1 dropped",
    ),
    (e.TrainingResumed(step=4, path="/c", tokens_total=9), "from step 4"),
    (
        e.StepCompleted(
            step=7,
            epoch=0,
            loss=1.23456,
            grad_norm=0.5,
            lr=2e-5,
            tokens=11,
            tokens_real=22,
            tokens_padded=33,
            tokens_total=44,
            samples=4,
            samples_digest="s",
            seconds=0.25,
            mfu=0.401,
            peak_memory_bytes=3 * 2**30,
        ),
        "step 7  loss 1.2346  grad 0.500  lr 2.00e-05  88 tok/s  MFU 40.1%  3.0 GiB",
    ),
    (
        e.ValidationCompleted(step=7, loss=1.5, tokens=1000, rows=5, seconds=1.0),
        "step 7  loss 1.5000 over 1,000 tokens",
    ),
    (
        e.SampleGenerated(step=7, prompt="who?", text="me", tokens=1, stopped=True),
        "step 7  'who?' → 'me'",
    ),
    (
        e.StoppedEarly(step=7, metric="c/score", best=0.51239, best_step=3, patience=2),
        "step 7  c/score has not improved on 0.5124 (step 3) in 2 values",
    ),
    (e.CheckpointStarted(step=7), "step 7"),
    (
        e.CheckpointPublished(step=7, path="/c", bytes=1_500_000_000, manifest_digest="m", seconds=2.0),
        "step 7  1.5 GB in 2.0 s",
    ),
    (e.CheckpointRejected(step=7, path="/c", reason="a is missing"), "step 7: a is missing"),
    (
        e.CheckpointDeleted(step=7, path="/c", bytes=1000, reason="retention"),
        "step 7  1.0 kB (retention)",
    ),
    (
        e.CheckpointReduced(
            step=7, path="/c.weights", former_path="/c", bytes=2000, freed_bytes=4000, manifest_digest="m"
        ),
        "step 7  2.0 kB of weights kept, 4.0 kB freed",
    ),
    (e.AnomalyDetected(step=7, what="loss_spike", detail={"loss": 9.0}), "step 7: loss_spike  loss 9"),
    (
        e.SamplesSkipped(step=4, sample=40, reason="loss_spike"),
        "back to step 4, continues at sample 40: loss_spike",
    ),
    (e.StopRequested(by="ada"), "by ada"),
    (e.StopRequested(by="ada", reason="late", then="paused"), "then paused, by ada: late"),
    (e.StopRequested(by="ada", now=True), "killed, by ada"),
    (e.RunDeferred(after=["a", "b"]), "waits for a, b to succeed"),
    (e.SweepJoined(sweep="sweep-1", values={"optimizer.lr": 0.1}), "sweep-1: optimizer.lr=0.1"),
    (e.RunHeld(by="ada", reason="lunch"), "by ada: lunch"),
    (e.RunReleased(by="ada"), "by ada"),
    (e.AttemptPaused(step=7, by="ada"), "at step 7, by ada"),
    (e.AttemptPreempted(step=7, by_run="calm-fox"), "at step 7, by calm-fox; queued again"),
    (
        e.AttemptPreempted(step=7, by_run="", reason="time limit"),
        "at step 7, time limit; queued again",
    ),
    (
        e.JobReported(job="12", state="PENDING", reason="Priority", nodes="n[1-2]"),
        "job 12  PENDING  Priority  n[1-2]",
    ),
    (e.ResumeRequested(by="ada"), "from the last checkpoint, by ada"),
    (
        e.ResumeRequested(by="ada", from_step=0, changes={"trainer.max_steps": [3, 6]}),
        "from step 0, by ada; trainer.max_steps: 3 → 6",
    ),
    (e.AttemptFailed(cause="killed", message="by SIGKILL", exit_code=None), "killed: by SIGKILL"),
    (e.AttemptLost(message="it is gone"), "it is gone"),
    (e.RunSucceeded(steps=12, tokens=3456, final_checkpoint="/c"), "12 steps, 3,456 trained tokens"),
    (e.RunFailed(cause="crash loop", message="3 times"), "crash loop: 3 times"),
    (e.RunCancelled(by="ada"), "by ada"),
    (e.RunRemoved(by="ada", freed_bytes=1500), "1.5 kB freed, by ada"),
    (
        e.ModelExported(step=7, path="/m", bytes=1500, digest="x", dtype="bfloat16"),
        "step 7  1.5 kB bfloat16 to /m",
    ),
    (
        e.ModelRegistered(step=7, name="support", model_version="3", digest="x", by="ada"),
        "step 7 as support version 3, by ada",
    ),
    (
        e.ExportProven(**PROOF, largest_difference=2.5e-4, tokens=12, rounding="float32"),
        "step 7  1 row, logits within 2.5e-04 (tolerance 1.0e-03, float32), 12 tokens equal: /m",
    ),
    (
        e.ExportDiverged(**PROOF, largest_difference=0.5, tokens=0, rounding="bfloat16", other_token=""),
        "step 7  logits differ by 5.0e-01 (tolerance 1.0e-03, bfloat16): /m",
    ),
    (
        e.ExportDiverged(
            **PROOF, largest_difference=0.5, tokens=0, rounding="bfloat16", other_token="row 1: x"
        ),
        "step 7  logits differ by 5.0e-01 (tolerance 1.0e-03, bfloat16); row 1: x: /m",
    ),
    (
        e.SystemSampled(
            host="h", cpu_percent=12.3, memory_used_bytes=2**30, memory_total_bytes=2**40, gpus=[GPU]
        ),
        "CPU 12 %, 1.0 GiB, GPU 3 97 % 5.0 GiB",
    ),
    (e.EvaluationRequested(name="a", step=7, by="ada"), "step 7  a, by ada"),
    (
        e.EvaluationStarted(
            name="a", step=7, checkpoint="/c", manifest_digest="m", daemon="d", devices=["cpu:0", "cpu:1"]
        ),
        "step 7  a on cpu:0, cpu:1, by d",
    ),
    (
        e.EvaluationInterrupted(name="a", step=7, reason="made room for calm-fox"),
        "step 7  a: made room for calm-fox",
    ),
    (
        e.EvaluationCompleted(
            name="a",
            step=7,
            kind="prompts",
            metrics={"exact_match": 0.5123},
            questions=9,
            questions_digest="q",
            manifest_digest="m",
            environment={},
            seconds=1.0,
        ),
        "step 7  a: exact_match 0.5123",
    ),
    (
        e.EvaluationFailed(name="a", step=7, cause="timeout", message="after 9 s", will_retry=False),
        "step 7  a: timeout: after 9 s",
    ),
    (
        e.ReplayVerified(from_step=4, to_step=9, is_exact=True, environment={}, by="ada"),
        "steps 5 to 9 match the log bit for bit, verified by ada",
    ),
    (
        e.ReplayVerified(from_step=4, to_step=9, is_exact=False, environment={}, by="ada"),
        "steps 5 to 9 match the log to within rounding, verified by ada",
    ),
    (
        e.ReplayDiverged(
            from_step=4,
            to_step=9,
            step=6,
            detail={"loss": {"recorded": 1.0, "redone": 2.0}},
            environment={"torch": ["2.10", "2.11"]},
            by="ada",
        ),
        "step 6 differs from the log (loss); environment differs: torch, verified by ada",
    ),
]


@pytest.mark.parametrize(("event", "said"), SAID, ids=[type(event).__name__ for event, _ in SAID])
def test_an_event_is_described_by_its_own_numbers(event: Any, said: str) -> None:
    assert summary(event) == said


def test_every_type_of_event_has_words() -> None:
    assert {type(event).__name__ for event, _ in SAID} == set(e.EVENT_TYPES)


PROGRESS = {
    "ModelLoaded",
    "DataBound",
    "TrainingResumed",
    "StepCompleted",
    "ValidationCompleted",
    "SampleGenerated",
    "CheckpointPublished",
    "CheckpointRejected",
    "CheckpointDeleted",
    "AnomalyDetected",
    "EvaluationCompleted",
    "EvaluationFailed",
    "StoppedEarly",
}


def test_progress_is_the_summary_with_the_number_of_planned_steps() -> None:
    assert set(e.progress_types()) == PROGRESS
    for event, said in SAID:
        is_progress = type(event).__name__ in PROGRESS
        if isinstance(event, OfStep):
            assert event.line(900) == f"step   7/900  {event.progress}{said.removeprefix('step 7  ')}"
        else:
            assert event.line(900) == (f"{event.progress}{said}" if is_progress else None)


def test_the_demo_says_of_an_event_what_the_log_says() -> None:
    out = Console(file=io.StringIO(), width=200)
    with LiveSteps(out, 9) as live:
        for number, (event, _) in enumerate(SAID, 1):
            live.show(recorded(event, number))
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    for event, said in SAID:
        if isinstance(event, e.AttemptFailed | e.AttemptLost | e.AttemptLaunched):
            assert f": {said}" in shown
        elif (line := event.line(9)) and type(event).__name__ not in (
            "StepCompleted",
            "SampleGenerated",
            "DataBound",
        ):
            assert f"   {line}\n" in shown


def recorded(event: e.Event, version: int) -> e.Recorded:
    return e.Recorded(
        position=version,
        event_id=str(version),
        run_id="r",
        version=version,
        type=type(event).__name__,
        schema_version=1,
        occurred_at=version,
        recorded_at=version,
        attempt=1,
        actor="test",
        causation_id=None,
        event=event,
    )
