"""`sftd queue` and sweeps, as a person sees them. No daemon and no training."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sftd.cli import main
from tests.builders import json_fields
from tests.builders.process.homes import Home


@pytest.fixture
def sftd(home: Home) -> Any:
    def invoke(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, arguments, env=home.env | {"COLUMNS": "80"})
        assert done.exit_code == code, done.output
        return done

    return invoke


GRID = ("--grid", "optimizer.lr=1e-5,2e-5", "--grid", "model.megatron.seed=1,2")


def test_a_sweep_is_checked_whole_then_queued_whole(home: Home, sftd: Any) -> None:
    config = str(home.config)
    shown = sftd("submit", config, *GRID, "--dry-run").stdout.splitlines()
    assert [line.partition(":")[0] for line in shown] == [
        "optimizer.lr=1e-05, model.megatron.seed=1",
        "optimizer.lr=1e-05, model.megatron.seed=2",
        "optimizer.lr=2e-05, model.megatron.seed=1",
        "optimizer.lr=2e-05, model.megatron.seed=2",
    ]
    refused = sftd("submit", config, "--grid", "optimizer.lr=1e-5,oops", "--grid", "a.b=1", code=2).stderr
    assert "refused: 2 problems; nothing was written" in refused, "each is told once"
    assert json.loads(sftd("ls", "--json").stdout) == []

    made = json.loads(sftd("submit", config, *GRID, "--json").stdout)
    json_fields.check("submit --grid", made[0])
    assert len({row["sweep"] for row in made}) == 1
    assert made[2]["values"] == {"optimizer.lr": 2e-05, "model.megatron.seed": 1}
    assert made[2]["name"] == f"lr 2e-5 seed 1 {made[2]['sweep']}"
    listed = json.loads(sftd("queue", "--json").stdout)
    assert [row["run_id"] for row in listed] == [row["run_id"] for row in made]
    spec = json.loads(sftd("show", made[2]["run_id"], "--json").stdout)["spec"]
    assert (spec["optimizer"]["lr"], spec["model"]["megatron"]["seed"]) == (2e-05, 1)
    assert sftd("submit", config, *GRID, "-q").stdout.count("\n") == 4
    assert "one run" in sftd("submit", config, *GRID, "--wait", code=2).stderr


def test_whom_a_run_would_wait_for_is_checked_without_queueing_too(home: Home, sftd: Any) -> None:
    for options in (("--dry-run",), (*GRID, "--dry-run"), ("launch.launcher=slurm", "--print-script")):
        said = sftd("submit", str(home.config), "--after", "nobody", *options, code=2)
        assert "There is no run 'nobody'" in said.stderr
        assert said.stdout == ""


def test_the_queue_says_what_each_run_waits_for_in_80_columns(home: Home, sftd: Any) -> None:
    assert "Nothing runs and nothing waits" in sftd("queue").stdout
    first = sftd("submit", str(home.config), "-q").stdout.strip()
    second = sftd("submit", str(home.config), "--after", first, "-q").stdout.strip()
    urgent = sftd("submit", str(home.config), "launch.priority=5", "-q").stdout.strip()
    sftd("hold", urgent, "--reason", "not yet")
    lines = sftd("queue").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[:2] for line in lines[1:]] == [
        [urgent, "held"],
        [first, "queued"],
        [second, "queued"],
    ]
    for line, ending in zip(
        lines[1:], ("`sftd release`", "a daemon: none runs", f"{first} (queued)"), strict=True
    ):
        assert line.endswith(ending)
    assert f"waits for {first} to succeed" in sftd("events", second).stdout
    assert "is queued" in sftd("pause", first, code=2).stderr
    sftd("cancel", first)
    assert [row["run_id"] for row in json.loads(sftd("queue", "--json").stdout)] == [urgent]
    assert "which was cancelled" in sftd("show", second).stdout.replace("\n", " ")


def test_whoever_cancels_a_run_is_told_which_are_cancelled_with_it(home: Home, sftd: Any) -> None:
    first = sftd("submit", str(home.config), "-q").stdout.strip()
    second = sftd("submit", str(home.config), "--after", first, "-q").stdout.strip()
    third = sftd("submit", str(home.config), "--after", second, "-q").stdout.strip()
    assert sftd("cancel", first).stdout.splitlines() == [
        f"{first} is cancelled",
        f"{second} is cancelled with it (--after)",
        f"{third} is cancelled with it (--after)",
    ]
