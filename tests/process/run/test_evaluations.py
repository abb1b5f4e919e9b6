"""A real daemon, a real checkpoint and a user's program: the daemon is killed in the middle of the evaluation."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import yaml

from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home

PROGRAM = """
import json, os, sys, time
folder = sys.argv[1]
with open(os.environ["PIDS"], "a") as file:
    print(os.getpid(), file=file)
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.01)
print(json.dumps({"files": len(os.listdir(folder)), "step": int(os.environ["SFTD_EVALUATION_STEP"])}))
"""


def test_an_evaluation_survives_its_daemon_and_completes_once(home: Home) -> None:
    pids, go, program = home.path / "pids", home.path / "go", home.path / "count.py"
    program.write_text(PROGRAM)
    home.env |= {"PIDS": str(pids), "GO": str(go)}
    config = yaml.safe_load(home.config.read_text())
    config["trainer"] = {"max_steps": 2, "save_interval": 1}
    config["evaluation"] = [
        {"kind": "command", "name": "count", "argv": [sys.executable, "count.py"], "every_steps": 2}
    ]
    home.config.write_text(yaml.safe_dump(config))
    run_id = home.submit()
    daemon = home.start_daemon()
    until(pids.exists, "the program does not start")
    daemon.kill()
    daemon.wait(PATIENCE)
    (first,) = map(int, pids.read_text().split())
    until(lambda: not psutil.pid_exists(first), "the program outlives its daemon")
    go.touch()
    assert home.start_daemon("--drain").wait(PATIENCE) == 0
    events = home.events(run_id)
    told = [event for event in events if event["type"].startswith("Evaluation")]
    assert [event["type"] for event in told] == [
        "EvaluationStarted",
        "EvaluationFailed",
        "EvaluationStarted",
        "EvaluationCompleted",
    ]
    assert (told[1]["payload"]["cause"], told[1]["payload"]["will_retry"]) == ("lost", True)
    metrics = told[3]["payload"]["metrics"]
    assert metrics["step"] == 2
    assert metrics["files"] == 2
    assert len(pids.read_text().split()) == 2
    # It began when the run had ended, and has left the run and its checkpoint as they were.
    types = [event["type"] for event in events]
    assert types.index("RunSucceeded") < types.index("EvaluationStarted")
    state = home.show(run_id)
    assert (state["status"], state["evaluations"][0]["status"]) == ("succeeded", "done")
    rows = json.loads(home.run("checkpoints", run_id, "--json").stdout)
    assert {row["step"]: row["status"] for row in rows}[2] == "published"
    assert [path for path in (home.path / "home").rglob("*.safetensors") if "evaluations" in path.parts] == []
    folder = Path(home.path, "home", "runs", run_id, "evaluations", "count", "step-00000002")
    assert os.listdir(folder)
