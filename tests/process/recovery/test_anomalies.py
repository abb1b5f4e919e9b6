"""A loss that spikes on bad data: the daemon goes back before it and continues without the samples that led there."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.builders.process.homes import Home


def test_a_spike_is_rolled_back_and_its_samples_left_out(home: Home) -> None:
    # 80 samples that are learnt by heart, 4 of something else (the 21st step), and more of the first.
    rows = [[7, 8, 9, 10] * 4] * 80 + [[99, 3, 54, 120] * 4] * 4 + [[7, 8, 9, 10] * 4] * 36
    columns = {"input_ids": rows, "attention_mask": [[1] * 16] * 120, "labels": rows}
    pq.write_table(pa.table(columns), home.path / "spiky.parquet")
    run_id = home.submit(
        f"data.train_files=[{home.path}/spiky.parquet]",
        "data.shuffle=false",
        "optimizer.lr=1e-2",
        "scheduler.type=constant",
        "trainer.max_steps=null",
        "trainer.epochs=1",
        "trainer.save_interval=6",
        "training.on_spike=rollback",
        "training.spike_factor=2.5",
        "checkpoint.keep_last=9",
    )
    home.drain()
    shown = home.wait(run_id, "succeeded")

    (spike,) = home.events(run_id, "AnomalyDetected")
    assert spike["payload"]["what"] == "loss_spike"
    assert spike["payload"]["step"] == 21
    (skipped,) = home.events(run_id, "SamplesSkipped")
    # Back to the checkpoint of step 18, then on after the 21 steps of four samples.
    assert (skipped["payload"]["step"], skipped["payload"]["sample"]) == (18, 84)
    assert home.events(run_id, "AttemptFailed")[0]["payload"]["cause"] == "loss spike"
    assert shown["attempt"] == 2
    assert shown["order"] == [{"step": 18, "sample": 84}]
    steps: dict[int, Any] = {e["payload"]["step"]: e for e in home.events(run_id, "StepCompleted")}
    assert sorted(steps) == list(range(1, 31))
    assert all(steps[n]["payload"]["loss"] < 1.0 for n in range(19, 31))

    # Trained again from the beginning, it leaves out the same samples; each attempt's rows are known.
    verified = home.run("verify", run_id, "--from-step", "0")
    assert "verified: steps 1 to 30 match the log bit for bit" in verified.stdout
    seen = home.run("data", run_id, "--step", "20").stdout
    assert "attempt 1 saw other rows, which a rollback skipped" in seen
    assert "matches the log (attempt 2" in seen

    # From before the checkpoint to which it went back: the samples are read again, up to the spike, and left out again.
    home.run("resume", run_id, "--from-step", "12")
    home.drain()
    shown = home.wait(run_id, "succeeded")
    found = [e["payload"]["what"] for e in home.events(run_id, "AnomalyDetected")]
    assert found == ["loss_spike", "loss_spike"]
    assert shown["order"] == [{"step": 18, "sample": 84}]
    again = {
        e["payload"]["step"]: e["payload"]["samples_digest"] for e in home.events(run_id, "StepCompleted")
    }
    assert again == {n: e["payload"]["samples_digest"] for n, e in steps.items()}
    assert "matches the log (attempt 4" in home.run("data", run_id, "--step", "20").stdout
    assert "(all with the same samples match the log bit for bit)" in home.run("show", run_id).stdout
