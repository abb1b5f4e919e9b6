"""`sftd verify`, `sftd data` and `sftd replay` on one real run, trained again by the real torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.launcher import processes
from sftd.wire.attempt.directory import AttemptDir
from tests.builders import json_fields
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home
from tests.builders.process.tiny_llama import write_rows

ROWS, BATCH, SEED = 64, 4, 1234


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, warm_python: str
) -> Iterator[tuple[Home, str]]:
    """A home, and the id of its one run: 12 steps, checkpoints of steps 5, 10 and 12."""
    home = Home(tmp_path_factory.mktemp("verify"), tiny_model, warm_python)
    run_id = home.submit("checkpoint.keep_last=5", "scheduler.warmup_steps=2")
    home.drain()
    assert home.show(run_id)["status"] == "succeeded"
    yield home, run_id
    home.close()


@pytest.fixture
def changed_row(trained: tuple[Home, str]) -> Iterator[int]:
    """A row of the data file, changed until the test ends: the second that step 8 sees."""
    home, _ = trained
    path = home.path / "train.parquet"
    before = path.read_bytes()
    order = np.argsort(np.random.Philox(key=[SEED, 0]).random_raw(ROWS), kind="stable")
    row = int(order[7 * BATCH + 1])
    table = pq.read_table(path)
    ids, labels = table["input_ids"].to_pylist(), table["labels"].to_pylist()
    ids[row][-1] = labels[row][-1] = (ids[row][-1] + 1) % 128
    for name, values in (("input_ids", ids), ("labels", labels)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)
    yield row
    path.write_bytes(before)


def outcomes(home: Home, run_id: str) -> list[dict[str, Any]]:
    return home.events(run_id, "ReplayVerified", "ReplayDiverged")


def nothing_left(home: Home) -> bool:
    return not (home.path / "home" / "verify").exists()


def test_an_undisturbed_run_is_verified(trained: tuple[Home, str]) -> None:
    home, run_id = trained
    before = {p: p.stat().st_mtime_ns for p in (home.path / "home" / "runs").rglob("*") if p.is_file()}
    done = home.run("verify", run_id)
    assert "verified: steps 6 to 12 match the log bit for bit" in done.stdout
    assert f"{run_id}: training again from step 5 on cpu:0" in done.stderr
    assert f"{run_id}: step 12 of 12: 7 agree" in done.stderr
    last = outcomes(home, run_id)[-1]
    assert last["type"] == "ReplayVerified"
    payload = dict(last["payload"])
    assert payload.pop("by")
    assert payload == {"from_step": 5, "to_step": 12, "is_exact": True, "environment": {}}
    shown = home.show(run_id)
    assert (shown["last_replay"]["to_step"], shown["last_replay"]["diverged_at"]) == (12, None)
    assert "steps 6 to 12" in home.run("show", run_id).stdout
    environment = home.events(run_id, "ModelLoaded")[0]["payload"]["environment"]
    assert environment["cpu_capability"]
    assert "CUBLAS_WORKSPACE_CONFIG" in environment["variables"]
    # The run's own folder is as it was, and nothing is left of the other.
    assert before == {
        p: p.stat().st_mtime_ns for p in (home.path / "home" / "runs").rglob("*") if p.is_file()
    }
    assert nothing_left(home)


def test_a_changed_row_is_found_at_the_step_that_saw_it(trained: tuple[Home, str], changed_row: int) -> None:
    home, run_id = trained
    done = home.run("verify", run_id, "--from-step", "0", "--to-step", "10", "--json", check=1)
    outcome = json.loads(done.stdout)
    json_fields.check("verify diverged", outcome)
    assert (outcome["outcome"], outcome["step"], outcome["agreeing"]) == ("ReplayDiverged", 8, 7)
    assert (outcome["run_id"], outcome["recorded"]) == (run_id, True)
    assert "loss" in outcome["detail"]
    assert "samples_digest" not in outcome["detail"], "the same rows, with other contents"
    assert list(outcome["environment"]) == ["train_digest"]
    last = outcomes(home, run_id)[-1]
    assert (last["type"], last["payload"]["step"]) == ("ReplayDiverged", 8)
    assert last["payload"] == {name: outcome[name] for name in last["payload"]}
    assert home.show(run_id)["last_replay"]["diverged_at"] == 8

    seen = json.loads(home.run("data", run_id, "--step", "8", "--json", check=1).stdout)
    assert seen["rows"][1]["row"] == changed_row
    assert [(a["attempt"], a["agrees"], a["is_shown"]) for a in seen["attempts"]] == [(1, True, True)]
    assert "changed since the submit" in seen["problems"][0]


def test_another_learning_rate_is_found(trained: tuple[Home, str]) -> None:
    """Warm-up ends after step 2, so no step has the log's learning rate; a trial is not recorded."""
    home, run_id = trained
    before = outcomes(home, run_id)
    done = home.run("verify", run_id, "--from-step", "10", "--with", "optimizer.lr=2e-3", check=1)
    assert "diverged at step 11 (the first one)" in done.stdout
    assert "differs: optimizer.lr: log 0.001, now 0.002" in done.stdout
    assert "nothing was recorded" in done.stdout
    assert outcomes(home, run_id) == before


def test_another_length_is_tried_with_its_learning_rates(trained: tuple[Home, str]) -> None:
    home, run_id = trained
    done = home.run("verify", run_id, "--from-step", "10", "--with", "trainer.max_steps=20", check=1)
    assert "diverged at step 11 (the first one)" in done.stdout
    assert "differs: trainer.max_steps: log 12, now 20" in done.stdout


@pytest.mark.parametrize("victim", ["torchrun", "sftd"])
def test_what_is_killed_leaves_nothing(trained: tuple[Home, str], victim: str) -> None:
    home, run_id = trained
    before = outcomes(home, run_id)
    with subprocess.Popen(
        home.command("verify", run_id),
        env=home.env | {"HOLD_AT": "StepCompleted 6"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as verifying:
        torchrun = wait_for_torchrun(home, verifying)
        if victim == "torchrun":
            os.killpg(torchrun, signal.SIGKILL)
        else:
            verifying.terminate()
        _, errors = verifying.communicate(timeout=PATIENCE)
    assert verifying.returncode == (1 if victim == "torchrun" else 130)
    assert ("could not be trained again: killed" in errors) == (victim == "torchrun"), errors
    with pytest.raises(ProcessLookupError):
        os.kill(torchrun, 0)
    assert outcomes(home, run_id) == before
    assert nothing_left(home)


def test_a_verify_that_is_killed_takes_its_ranks_along(trained: tuple[Home, str]) -> None:
    """By the kernel, when memory is short: nothing in it can clean up. The next daemon removes the folder."""
    home, run_id = trained
    with subprocess.Popen(
        home.command("verify", run_id),
        env=home.env | {"HOLD_AT": "StepCompleted 6"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as verifying:
        wait_for_torchrun(home, verifying)
        (folder,) = (home.path / "home" / "verify").iterdir()
        token = AttemptDir(folder / "attempt").order().token
        until(lambda: processes.ranks(token))
        verifying.kill()
    until(lambda: processes.survivors(token) == [])
    found = json.loads(home.run("doctor", "--json", check=None).stdout)
    (said,) = (f["said"] for f in found if f["check"] == "leftovers" and f["state"] == "warning")
    assert said == "1 scratch folder of `sftd verify` that was killed"
    assert f"removed {folder}" in home.drain()
    assert nothing_left(home)


def wait_for_torchrun(home: Home, verifying: subprocess.Popen[str]) -> int:
    """The leader of torchrun's session, as soon as it has been started."""
    found: list[int] = []

    def is_started() -> bool:
        assert verifying.poll() is None, "it ended too early"
        folders = (home.path / "home" / "verify").glob("*/attempt")
        found.extend(p.pid for p in (AttemptDir(folder).process() for folder in folders) if p is not None)
        return bool(found)

    until(is_started, every=0.01)
    return found[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from-step", "7"], "has no checkpoint of step 7 in its timeline"),
        (["--to-step", "99"], "its own steps are 1 to 12"),
        (["--devices", "0"], "the steps are trained on CPUs"),
        (["--with", "optimizer.l=1"], "optimizer.l"),
        (["--with", "model.lora.rank=8"], "decides what a checkpoint holds"),
        (["--with", "trainer.max_steps=9"], "at least 12"),
        (["--with", "trainer.max_steps=null", "--with", "trainer.epochs=1"], "epochs cannot be tried"),
    ],
)
def test_what_cannot_be_is_refused(trained: tuple[Home, str], options: list[str], said: str) -> None:
    home, run_id = trained
    assert said in home.run("verify", run_id, *options, check=2).stderr


def test_rows_and_steps_find_each_other(trained: tuple[Home, str]) -> None:
    home, run_id = trained
    seen = json.loads(home.run("data", run_id, "--step", "3", "--json").stdout)
    json_fields.check("data --step", seen)
    for row in seen["rows"]:
        json_fields.check("data --step rows", row)
    json_fields.check("data --step attempts", seen["attempts"][0])
    log = next(e for e in home.events(run_id, "StepCompleted") if e["payload"]["step"] == 3)["payload"]
    assert (seen["samples_digest"], seen["tokens"]) == (log["samples_digest"], log["tokens"])
    order = np.argsort(np.random.Philox(key=[SEED, 0]).random_raw(ROWS), kind="stable")
    assert [row["row"] for row in seen["rows"]] == order[8:12].tolist()
    lengths = [len(row) for row in pq.read_table(home.path / "train.parquet")["input_ids"].to_pylist()]
    assert [row["length"] for row in seen["rows"]] == [lengths[i] for i in order[8:12]]
    row = seen["rows"][0]["row"]
    assert (
        f"digest {log['samples_digest'][:16]} matches the log (attempt 1"
        in home.run("data", run_id, "--step", "3").stdout
    )
    back = json.loads(home.run("data", run_id, "--row", str(row), "--json").stdout)
    json_fields.check("data --row", back)
    assert back["steps"] == [{"run_id": run_id, "step": 3, "epoch": 0, "recorded": True}]
    assert "the 64 rows of all files" in home.run("data", run_id, "--row", "64", check=2).stderr
    assert "give one of them" in home.run("data", run_id, "--step", "13", check=2).stderr


def test_the_log_is_played(trained: tuple[Home, str]) -> None:
    home, run_id = trained
    played = json.loads(home.run("replay", run_id, "--json").stdout)
    shown = home.show(run_id)
    assert {name: shown[name] for name in played["state"]} == played["state"]
    steps = next(m for m in played["milestones"] if m["type"] == "Steps")
    assert (steps["first"], steps["last"], steps["checkpoints"]) == (1, 12, [5, 10, 12])
    at_five = json.loads(home.run("replay", run_id, "--until", "5", "--json").stdout)["state"]
    assert (at_five["step"], at_five["status"]) == (5, "running")
    assert [c["step"] for c in at_five["checkpoints"]] == [5]
    text = home.run("replay", run_id, "--until", "step:5").stdout
    assert "steps 1–5" in text
    assert "5 of 12" in text


def test_a_row_of_a_fork_with_other_data_is_not_its_parents(trained: tuple[Home, str]) -> None:
    home, run_id = trained
    other = write_rows(home.path / "other.parquet", 20, seed=9)
    changes = (f"data.train_files=[{other}]", "trainer.max_steps=17")
    fork = home.run("fork", run_id, "--from-step", "12", *changes, "-q").stdout.strip()
    answer = json.loads(home.run("data", fork, "--row", "3", "--json").stdout)
    assert (answer["file"], answer["read_other_files"]) == (str(other), [run_id])
    assert [step["run_id"] for step in answer["steps"]] == [fork], "an epoch is five steps"
    said = home.run("data", fork, "--row", "3").stdout
    assert f"{run_id}, its parent, read other files: see sftd data {run_id} --row 3" in said
