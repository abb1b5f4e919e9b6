"""Every field of every `--json` answer that is read from the log, against the history that was written there.

The expected values are written by hand, or computed here from the table of steps; none comes from a function of sftd. An
answer that gains, loses or renames a field fails, and so does a new command with `--json` that no test covers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from sftd.cli import COMMANDS, main
from sftd.projections import views
from sftd.store.database.engine import Store, open_engine
from tests.builders.json_fields import FIELDS
from tests.builders.log.json_world import ENVIRONMENT, STEPS, World
from tests.builders.paths import ROOT

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def world(shared_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = open_engine(shared_database_url)
    store = Store(engine, before_commit=(views.catch_up,), clock=lambda _connection, local: local)
    yield World(store, tmp_path_factory.mktemp("checkpoints"))
    engine.dispose()


@pytest.fixture
def run(
    world: World, shared_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", shared_database_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return lambda *arguments: CliRunner().invoke(main, arguments, catch_exceptions=False)


@pytest.fixture
def ask(run: Callable[..., Result]) -> Ask:
    """Run a command, and return its answer: one JSON value, and nothing besides on stdout."""

    def answer(*arguments: str) -> Any:
        done = run(*arguments, "--json")
        assert (done.exit_code, done.stderr) == (0, ""), done.output
        assert done.stdout.endswith("\n")
        return json.loads(done.stdout)

    return answer


def iso(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def rows(world: World, run_id: str) -> list[dict[str, Any]]:
    """The events of a run as the table has them."""
    query = sa.text("SELECT * FROM events WHERE run_id = :run ORDER BY version")
    with world.store.engine.connect() as connection:
        return [dict(row._mapping) for row in connection.execute(query, {"run": run_id})]


def pace(*seconds: float) -> float:
    """The smoothed time of a step: the first alone, the second in its place, then a fifth of each."""
    found = seconds[1]
    for one in seconds[2:]:
        found = 0.8 * found + 0.2 * one
    return found


def tokens(last: int) -> int:
    return sum(STEPS[n][3] for n in range(1, last + 1))


# By hand, from the times in `World._base`; docs/goodput.md says what belongs where.
BASE_SECONDS = {
    "queued": 10.0,
    "starting": 8.0,
    "productive": 13.5,
    "replayed": 3.0,
    "validating": 3.5,
    "checkpointing": 4.0,
    "restarting": 18.0,
    "idle": 0.0,
    "other": 5.0,
    "wall": 65.0,
    "goodput": 13.5 / 55.0,
}
# Step 3 is done twice; what the second attempt needs for its first step is not counted.
BASE_PACE = pace(2.0, 2.5, 3.0, 2.0, 2.0, 2.0)


def test_events_are_the_rows_of_the_table(world: World, run: Callable[..., Result]) -> None:
    for run_id in (world.base, world.fork, world.bad):
        answers = [json.loads(line) for line in run("events", run_id, "--json").stdout.splitlines()]
        wanted = rows(world, run_id)
        for row in wanted:
            for name in ("occurred_at", "recorded_at"):
                row[name] = iso(row[name])
            row["payload"] = json.loads(row["payload"])
        assert answers == wanted
    some = run("events", world.base, "--json", "-t", "ValidationCompleted", "-t", "CheckpointPinned")
    assert [json.loads(line)["payload"].get("loss") for line in some.stdout.splitlines()] == [
        3.5,
        2.5,
        2.75,
        None,
    ]


def listed(world: World, run_id: str, **changes: Any) -> dict[str, Any]:
    """A run that waits and has done nothing, as `ls` lists it, with what differs."""
    return {
        "run_id": run_id,
        "status": "queued",
        "project": "geo",
        "name": "",
        "user": "ada",
        "started_at": None,
        "ended_at": None,
        "attempt": 0,
        "step": 0,
        "planned_steps": 6,
        "loss": None,
        "val_loss": None,
        "seconds_per_step": None,
        "anomalies": 0,
        "message": None,
        "sweep": None,
        "changed": {},
        "bytes": 0,
        "eta_seconds": None,
    } | changes


def base_row(world: World) -> dict[str, Any]:
    return listed(
        world,
        world.base,
        status="succeeded",
        name="base",
        submitted_at=iso(world.at(0)),
        started_at=iso(world.at(10)),
        ended_at=iso(world.at(65)),
        attempt=2,
        step=6,
        loss=1.75,
        val_loss=2.75,
        seconds_per_step=pytest.approx(BASE_PACE),
        anomalies=1,
        bytes=8000,
    )


def point_rows(world: World) -> list[dict[str, Any]]:
    return [
        listed(
            world,
            run_id,
            submitted_at=iso(world.at(140)),
            sweep=world.sweep,
            changed={"optimizer.lr": lr},
        )
        for run_id, lr in zip(world.points, (1e-5, 2e-5), strict=True)
    ]


def test_ls_lists_every_run_with_what_the_log_has(world: World, ask: Ask) -> None:
    wanted = [
        listed(
            world,
            world.again,
            status="retrying",
            name="again",
            submitted_at=iso(world.at(150)),
            started_at=iso(world.at(151)),
            attempt=1,
            message="killed: killed it was",
        ),
        *sorted(point_rows(world), key=lambda row: row["run_id"]),
        listed(world, world.later, name="later", user="cy", submitted_at=iso(world.at(130))),
        listed(world, world.held, status="held", name="held", user="bob", submitted_at=iso(world.at(120))),
        listed(
            world,
            world.going,
            status="running",
            name="going",
            submitted_at=iso(world.at(100)),
            started_at=iso(world.at(101)),
            attempt=1,
            step=2,
            planned_steps=10,
            loss=3.0,
            seconds_per_step=2.5,
            eta_seconds=8 * 2.5,
        ),
        listed(
            world,
            world.bad,
            status="failed",
            project="other",
            name="bad",
            user="bob",
            submitted_at=iso(world.at(80)),
            started_at=iso(world.at(81)),
            ended_at=iso(world.at(90)),
            attempt=1,
            step=1,
            loss="NaN",
            seconds_per_step=2.0,
            message="not a number: not a number it was",
        ),
        listed(
            world,
            world.fork,
            name="fork",
            user="bob",
            submitted_at=iso(world.at(70)),
            step=2,
            planned_steps=8,
            sweep="",
            changed={"trainer.max_steps": 8, "optimizer.lr": 5e-4, "trainer.experiment_name": "fork"},
        ),
        base_row(world),
    ]
    assert ask("ls") == wanted
    assert ask("show", world.sweep) == [row for row in wanted if row["run_id"] in world.points]
    assert ask("ls", "-s", "failed", "-s", "held", "-p", "other") == [wanted[6]]
    assert ask("ls", "--sort", "val", "-n", "1") == [wanted[-1]]
    # The lowest first; a run without a loss that can be compared comes last.
    assert [row["loss"] for row in ask("ls", "--sort", "loss")][:2] == [1.75, 3.0]
    assert [row["step"] for row in ask("ls", "--sort", "step")][:4] == [6, 2, 2, 1]
    assert ask("ls", "--sort", "size")[0] == wanted[-1]


def checkpoint(world: World, step: int, published: float, version: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "path": str(world.folder / world.base / f"step-{step:08d}"),
        "bytes": 1000 * step,
        "manifest_digest": f"m{step}",
        "tokens_total": tokens(step),
        "version": version,
        "published_at": world.at(published),
        "val_loss": None,
        "verified": False,
        "superseded": False,
        "is_parents": False,
        "forks": [],
        "order": [],
        "weights_only": False,
    } | more


def version_of(world: World, run_id: str, kind: str, nth: int = 0) -> int:
    return int([row["version"] for row in rows(world, run_id) if row["type"] == kind][nth])


def sources(number: int) -> dict[str, dict[str, Any]]:
    """Of a step of every run."""
    loss, _, _, trained, *_ = STEPS[number]
    return {
        "docs": {"rows": 3, "tokens": trained - 2, "loss": loss + 0.5},
        "math": {"rows": 1, "tokens": 2, "loss": loss - 1.0},
    }


def measured(number: int) -> dict[str, Any]:
    return {
        "step": number,
        "token_accuracy": number / 8,
        "entropy": number / 4,
        "sources": sources(number),
    }


def state(world: World, run_id: str, **changes: Any) -> dict[str, Any]:
    """The whole state of a run that waits, with what differs. The spec is what was submitted."""
    events = rows(world, run_id)
    (submitted,) = (json.loads(row["payload"]) for row in events if row["type"] == "RunSubmitted")
    return {
        "run_id": run_id,
        "version": len(events),
        "status": "queued",
        "spec": submitted["spec"],
        "spec_digest": submitted["spec_digest"],
        "user": "ada",
        "train_digest": "d",
        "val_digest": "",
        "planned_steps": 6,
        "fork": None,
        "order": [],
        "started_at": None,
        "ended_at": None,
        "removed_at": None,
        "updated_at": events[-1]["occurred_at"],
        "attempt": 0,
        "daemon": None,
        "job": "",
        "retry_at": None,
        "stop_by": None,
        "stop_reason": "",
        "stop_then": "cancelled",
        "stop_now": False,
        "preempted_by": None,
        "after": [],
        "sweep": "",
        "resume_from": None,
        "is_exact": True,
        "loose_until": None,
        "began_at": 0,
        "environment": {},
        "step": 0,
        "loss": None,
        "lr": None,
        "tokens_counted": 0,
        "tokens_reported": 0,
        "seconds_per_step": None,
        "tokens_per_second": None,
        "first_validation": None,
        "last_validation": None,
        "best_validation": None,
        "checkpoints": [],
        "rejected_pins": {},
        "last_replay": None,
        "evaluations": [],
        "stopped_early": None,
        "patience_from": -1,
        "sources": [],
        "saving": None,
        "highest_step": 0,
        "steps_redone": 0,
        "anomalies": 0,
        "preemptions": 0,
        "attempt_base": 0,
        "attempt_progressed": False,
        "fruitless_attempts": 0,
        "cause": None,
        "message": None,
    } | changes


def base_state(world: World) -> dict[str, Any]:
    publish = "CheckpointPublished"
    return state(
        world,
        world.base,
        status="succeeded",
        submitted_at=world.at(0),
        started_at=world.at(10),
        ended_at=world.at(65),
        updated_at=world.at(70),
        attempt=2,
        began_at=2,
        environment=ENVIRONMENT,
        step=6,
        loss=1.75,
        lr=2e-5,
        tokens_counted=63,
        tokens_reported=63,
        seconds_per_step=pytest.approx(BASE_PACE),
        tokens_per_second=21 / 2.0,
        first_validation={"step": 2, "loss": 3.5},
        last_validation={"step": 6, "loss": 2.75},
        best_validation={"step": 4, "loss": 2.5},
        checkpoints=[
            checkpoint(
                world,
                2,
                27,
                version_of(world, world.base, publish),
                val_loss=3.5,
                verified=True,
                forks=[world.fork],
            ),
            checkpoint(world, 6, 64, version_of(world, world.base, publish, 1), val_loss=2.75),
        ],
        saving={"step": 6, "tokens_total": 63, "val_loss": 2.75},
        highest_step=6,
        steps_redone=1,
        anomalies=1,
        attempt_base=3,
        attempt_progressed=True,
    )


def test_show_is_the_whole_state_and_where_its_time_went(world: World, ask: Ask) -> None:
    shown = ask("show", world.base)
    assert shown.pop("goodput") == pytest.approx(BASE_SECONDS)
    planned = shown.pop("planned")
    assert shown.pop("figures") == {
        "step": measured(6),
        "validation": {"step": 6, "token_accuracy": 0.25, "entropy": 1.5, "sources": None},
    }
    assert shown == base_state(world)
    assert set(planned) == {"compared", "plan"}
    compared = planned["compared"]
    assert {name: (one["unit"], one["actual"]) for name, one in compared.items()} == {
        "peak memory": ("bytes", 250_000_000),
        "step": ("seconds", pytest.approx(BASE_PACE)),
        "whole run": ("seconds", 55.0),
        "checkpoint": ("bytes", 6000),
        "checkpoints kept": ("bytes", 8000),
    }
    for one in compared.values():
        assert set(one) == {"unit", "planned", "actual", "error"}
        assert one["planned"] > 0
        assert one["error"] == pytest.approx((one["planned"] - one["actual"]) / one["actual"])
    plan = planned["plan"]
    assert {name: one["planned"] for name, one in compared.items()} == {
        "peak memory": max(stage["total"] for stage in plan["memory"]),
        "step": plan["pace"]["step"],
        "whole run": plan["pace"]["total"],
        "checkpoint": plan["storage"]["checkpoint"],
        "checkpoints kept": plan["storage"]["at_end"],
    }


def test_show_of_runs_that_wait_fail_and_continue(world: World, ask: Ask) -> None:
    forked = ask("show", world.fork)
    wall = forked.pop("goodput")
    # All of its time it waits, until this moment.
    assert wall["queued"] == wall["wall"] >= 930.0
    assert (wall["goodput"], forked.pop("planned")) == (None, None)
    assert forked.pop("figures") == {"step": None, "validation": None}
    assert forked == state(
        world,
        world.fork,
        user="bob",
        train_digest="e" * 64,
        planned_steps=8,
        submitted_at=world.at(70),
        fork={"parent": world.base, "step": 2, "tokens_total": tokens(2), "sample": 0, "mixture": None},
        order=[{"step": 2, "sample": 0}],
        step=2,
        highest_step=2,
        attempt_base=2,
        tokens_counted=tokens(2),
        tokens_reported=tokens(2),
        checkpoints=[
            checkpoint(world, 2, 70, 1, is_parents=True, order=[{"step": 2, "sample": 0}]),
        ],
    )

    failed = ask("show", world.bad)
    assert failed.pop("goodput")["wall"] == 10.0
    assert failed.pop("planned")["compared"]["whole run"]["actual"] is None
    assert failed.pop("figures") == {"step": measured(1), "validation": None}
    assert failed == state(
        world,
        world.bad,
        user="bob",
        status="failed",
        submitted_at=world.at(80),
        started_at=world.at(81),
        ended_at=world.at(90),
        attempt=1,
        environment=ENVIRONMENT,
        step=1,
        loss="NaN",
        lr=1e-5,
        tokens_counted=8,
        tokens_reported=8,
        seconds_per_step=2.0,
        tokens_per_second=16 / 2.0,
        highest_step=1,
        fruitless_attempts=1,
        cause="not a number",
        message="not a number it was",
    )

    again = ask("show", world.again)
    assert (again["status"], again["retry_at"]) == ("retrying", world.at(999 + 500))
    assert (again["fruitless_attempts"], again["cause"]) == (1, "killed")
    assert ask("show", world.later)["after"] == [world.going]
    assert ask("show", world.points[0])["sweep"] == world.sweep
    going = ask("show", world.going)
    assert (going["status"], going["daemon"], going["ended_at"]) == ("running", "d1", None)


def queued(world: World, run_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "queued",
        "priority": 0,
        "devices": 2,
        "user": "ada",
        "project": "geo",
        "step": 0,
        "planned_steps": 6,
        "seconds_left": None,
        "host": None,
        "observed": True,
        "job": "",
        "kind": "",
        "waits_for": "",
        "not_before": None,
        "starts_at": None,
    } | changes


def test_queue_lists_who_runs_and_who_waits_in_order(world: World, ask: Ask) -> None:
    answer = ask("queue")
    # When a run may start depends on this moment: the runs that fit start now, the others when they do.
    starts = {row["run_id"]: row.pop("starts_at") for row in answer}
    wanted = [
        queued(
            world,
            world.going,
            status="running",
            step=2,
            planned_steps=10,
            seconds_left=20.0,
            host="node-1",
        ),
        queued(
            world,
            world.later,
            priority=3,
            user="cy",
            kind="after",
            waits_for=f"{world.going} (running)",
        ),
        queued(
            world, world.fork, user="bob", step=2, planned_steps=8, kind="start", waits_for="about to start"
        ),
        queued(world, world.held, user="bob", status="held", kind="held", waits_for="`sftd release`"),
        *(
            queued(world, run_id, kind="devices" if n == 0 else "behind", waits_for=what)
            for n, (run_id, what) in enumerate(
                zip(world.points, ("2 CPUs, 0 free", f"turn of {world.points[0]}"), strict=True)
            )
        ),
        queued(
            world,
            world.again,
            status="retrying",
            kind="backoff",
            waits_for="its next try",
            not_before=iso(world.at(999 + 500)),
        ),
    ]
    for row in wanted:
        del row["starts_at"]
    assert answer == wanted
    # The run that trains has 20 s left, and then the one with the highest priority starts. What has made no step ends at
    # no known time.
    assert starts[world.fork] < starts[world.later]
    others = (world.going, world.held, *world.points, world.again)
    assert {starts[run_id] for run_id in others} == {None}


def line(world: World, run_id: str, **more: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "running",
        "attempt": 1,
        "step": 2,
        "planned_steps": 10,
        "loss": 3.0,
        "anomalies": 0,
        "losses": [4.0, 3.0],
        "tokens_per_second": (16 + 17) / 4.5,
        "mfu": pytest.approx((0.5 * 2.0 + 0.4 * 2.5) / 4.5),
        "token_accuracy": pytest.approx(3 / 16),
        "memory": 300_000_000,
        "seconds_left": 20.0,
        "stepped_at": iso(world.at(111)),
        "last": {
            "at": iso(world.at(105)),
            "run_id": run_id,
            "attempt": 1,
            "type": "ModelLoaded",
            "what": "a, 0.0 M parameters, float32 on cpu, 1.0 s",
        },
        "host": "node-1",
        "observed": True,
    } | more


def test_watch_shows_what_the_queue_the_nodes_and_the_log_have(world: World, ask: Ask) -> None:
    board = ask("watch")
    assert set(board) == {"at", "runs", "waiting", "nodes", "failures", "events"}
    assert board["runs"] == [line(world, world.going)]
    queue = [row for row in ask("queue") if row["kind"]]
    for row in (*board["waiting"], *queue):
        del row["starts_at"]
    assert board["waiting"] == queue
    nodes = ask("nodes")
    for node in (*board["nodes"], *nodes):
        del node["unseen_seconds"]
    assert board["nodes"] == nodes
    assert [(event["run_id"], event["type"], event["what"]) for event in board["failures"]] == [
        (world.again, "AttemptFailed", "killed: killed it was"),
        (world.bad, "RunFailed", "not a number: not a number it was"),
        (world.bad, "AttemptFailed", "not a number: not a number it was"),
        (world.base, "AnomalyDetected", "step 6: loss_spike  loss 9  median 2"),
        (world.base, "AttemptFailed", "killed: killed it was"),
    ]
    assert [event["type"] for event in board["events"]][:3] == [
        "AttemptLaunched",
        "AttemptClaimed",
        "RunSubmitted",
    ]
    for event in (*board["events"], *board["failures"]):
        assert set(event) == {"at", "run_id", "attempt", "type", "what"}
        (row,) = (
            r
            for r in rows(world, event["run_id"])
            if (r["type"], iso(r["occurred_at"]), r["attempt"])
            == (event["type"], event["at"], event["attempt"])
        )


def test_watch_of_one_run_has_its_line_and_its_ledger(world: World, ask: Ask) -> None:
    board = ask("watch", world.going)
    assert board["sources"] == sources(2)
    assert set(board) == {"at", "goodput", "sources", "events", *line(world, world.going)}
    for name, value in line(world, world.going).items():
        assert board[name] == value, name
    assert [event["type"] for event in board["events"]] == [
        "ModelLoaded",
        "AttemptLaunched",
        "AttemptClaimed",
        "RunSubmitted",
    ]
    assert set(board["goodput"]) == set(BASE_SECONDS)
    assert (board["goodput"]["queued"], board["goodput"]["productive"]) == (1.0, 4.5)
    ended = ask("watch", world.base)
    assert ended["goodput"] == pytest.approx(BASE_SECONDS)
    assert (ended["losses"], ended["host"], ended["seconds_left"]) == (
        [STEPS[n][0] for n in range(1, 7)],
        None,
        None,
    )


def test_nodes_are_the_daemons_with_what_they_drive(world: World, ask: Ask) -> None:
    def node(number: int, **changes: Any) -> dict[str, Any]:
        return {
            "host": f"node-{number}",
            "daemon": f"d{number}",
            "state": "alive",
            "pid": 7,
            "home": f"/home/node-{number}",
            "devices": {
                "gpus": {"total": 2, "used": 0, "free": 2},
                "cpus": {"total": 4, "used": 0, "free": 4},
            },
            "runs": [],
            "started_at": iso(world.start),
            "seen_at": iso(world.at(3600)),
            "unseen_seconds": 0.0,
        } | changes

    first, second = ask("nodes", "--all")
    assert first == node(
        1,
        runs=[world.going],
        devices={
            "gpus": {"total": 2, "used": 0, "free": 2},
            "cpus": {"total": 4, "used": 2, "free": 2},
        },
    )
    assert second.pop("seen_at") == iso(world.at(5))
    assert second.pop("unseen_seconds") >= 994.0
    wanted = node(2, state="stopped")
    assert second == {name: wanted[name] for name in second}


def test_checkpoints_are_those_of_the_log_and_why_they_are_kept(world: World, ask: Ask) -> None:
    def row(step: int, published: float, **changes: Any) -> dict[str, Any]:
        return {
            "step": step,
            "status": "published",
            "path": str(world.folder / world.base / f"step-{step:08d}"),
            "bytes": 1000 * step,
            "layout": {"tp": 1, "dp": 2},
            "published_at": iso(world.at(published)),
        } | changes

    # It keeps the last two by default, and the best one.
    pinned = ["last 2", "last verified", f"fork {world.fork} starts from it"]
    assert ask("checkpoints", world.base) == [
        row(2, 27, status="pinned", val_loss=3.5, kept_because=pinned),
        row(6, 64, val_loss=2.75, kept_because=["last", "best", "final"]),
    ]
    assert ask("checkpoints", world.going) == []


def test_lineage_is_the_tree_of_forks(world: World, ask: Ask) -> None:
    tree = ask("lineage", world.fork)
    changes = {
        "trainer.max_steps": [6, 8],
        "optimizer.lr": [1e-5, 5e-4],
        "trainer.experiment_name": ["base", "fork"],
    }
    assert tree == {
        "run_id": world.base,
        "parent": None,
        "forked_at": None,
        "changes": {},
        "status": "succeeded",
        "step": 6,
        "planned_steps": 6,
        "loss": 1.75,
        "val_loss": 2.75,
        "asked": False,
        "forks": [
            {
                "run_id": world.fork,
                "parent": world.base,
                "forked_at": 2,
                "changes": changes,
                "status": "queued",
                "step": 2,
                "planned_steps": 8,
                "loss": None,
                "val_loss": None,
                "asked": True,
                "forks": [],
            }
        ],
    }


def figures(world: World, run_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "running",
        "parent": None,
        "inherited_steps": 0,
        "step": 2,
        "planned_steps": 10,
        "attempts": 1,
        "steps_redone": 0,
        "anomalies": 0,
        "val_loss": None,
        "best_val_loss": None,
        "best_val_step": None,
        "devices": 2,
        "message": None,
        "metrics": {},
    } | changes


def test_compare_has_figures_differences_partings_and_curves(world: World, ask: Ask) -> None:
    answer = ask("compare", world.base, world.going, world.fork, "--price", "3")
    assert set(answer) == {"runs", "differences", "partings", "curves"}
    base, going, fork = answer["runs"]
    assert base.pop("seconds") == pytest.approx(BASE_SECONDS)
    # Two devices, from the claim of each attempt to its end.
    hours = 2 * ((32 - 10) + (65 - 40)) / 3600
    assert base == figures(
        world,
        world.base,
        status="succeeded",
        name="geo/base",
        step=6,
        planned_steps=6,
        attempts=2,
        steps_redone=1,
        anomalies=1,
        loss=1.75,
        tail_loss=1.75,
        token_accuracy=0.75,
        source_losses={"docs": 2.25, "math": 0.75},
        lowest_loss=1.75,
        lowest_loss_step=6,
        val_loss=2.75,
        best_val_loss=2.5,
        best_val_step=4,
        tokens=63,
        tokens_per_second=pytest.approx(sum(row[4] for row in STEPS.values()) / 13.5),
        mfu=pytest.approx(math.fsum(row[7] * row[6] for row in STEPS.values()) / 13.5),
        peak_memory_bytes=300_000_000,
        wall_seconds=65.0,
        held_seconds=55.0,
        goodput=pytest.approx(13.5 / 55),
        device_hours=pytest.approx(hours),
        cost=pytest.approx(3 * hours),
    )
    assert going.pop("wall_seconds") == pytest.approx(going.pop("held_seconds") + 1.0)
    assert going.pop("device_hours") * 3 == pytest.approx(going.pop("cost"))
    assert set(going.pop("seconds")) == set(BASE_SECONDS)
    assert 0 < going.pop("goodput") < 4.5 / 800
    assert going == figures(
        world,
        world.going,
        name="geo/going",
        loss=3.0,
        tail_loss=3.0,
        token_accuracy=0.25,
        source_losses={"docs": 3.5, "math": 2.0},
        lowest_loss=3.0,
        lowest_loss_step=2,
        tokens=17,
        tokens_per_second=pytest.approx(33 / 4.5),
        mfu=pytest.approx(2.0 / 4.5),
        peak_memory_bytes=300_000_000,
    )
    # A fork that has done nothing shows its parent's curve, and no time of its own.
    assert (fork["parent"], fork["inherited_steps"], fork["tokens"]) == (world.base, 2, 17)
    assert (fork["loss"], fork["lowest_loss_step"], fork["mfu"], fork["device_hours"]) == (3.0, 2, None, 0.0)
    assert set(fork) == set(answer["runs"][0]) | {"seconds"}

    assert answer["partings"] == [
        {
            "other": name,
            "first": 1,
            "last": 2,
            "bits": {},
            "rounding": {},
            "at": None,
            "beyond_rounding": None,
        }
        for name in (world.going, world.fork)
    ]
    found = {d["key"]: d for d in answer["differences"]}
    assert {key: d["values"] for key, d in found.items()} == {
        "optimizer.lr": [1e-5, 1e-5, 5e-4],
        "trainer.max_steps": [6, 10, 8],
        "training data (sha256)": ["d", "d", "e" * 16],
    }
    for key, d in found.items():
        group = "data" if "data" in key else "config"
        assert d == {
            "group": group,
            "key": key,
            "values": d["values"],
            "keeps_steps": False,
            "untold": [],
        }
    curves = answer["curves"]
    assert (set(curves), curves["steps_per_point"]) == ({"steps_per_point", "runs"}, 1)
    losses = [STEPS[n][0] for n in range(1, 7)]
    assert curves["runs"][world.base] == {
        "loss": [
            {"first": n, "last": n, "mean": loss, "low": loss, "high": loss, "odd": 0}
            for n, loss in enumerate(losses, 1)
        ],
        "validation": [
            {"step": 2, "loss": 3.5},
            {"step": 4, "loss": 2.5},
            {"step": 6, "loss": 2.75},
        ],
    }
    assert [p["mean"] for p in curves["runs"][world.fork]["loss"]] == losses[:2]


def test_the_price_is_that_of_the_option_or_of_the_settings(
    world: World, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ("compare", world.base, world.going)
    hours = 2 * ((32 - 10) + (65 - 40)) / 3600
    assert ask(*runs)["runs"][0]["cost"] is None
    monkeypatch.setenv("SFTD_DEVICE_PRICE", "2.5")
    assert ask(*runs)["runs"][0]["cost"] == pytest.approx(2.5 * hours)
    assert ask(*runs, "--price", "4")["runs"][0]["cost"] == pytest.approx(4 * hours)
    assert ask(*runs, "--price", "0")["runs"][0]["cost"] == 0


def cells(text: str, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Rows of a table by their first words: the other cells of each, of which two blanks or more part one from the next."""
    found = {}
    for row in text.splitlines():
        name = next((n for n in names if row.strip().startswith(f"{n}  ")), None)
        if name is not None:
            found.setdefault(name, re.split(r" {2,}", row.strip())[1:])
    return found


def test_people_read_the_same_numbers_in_the_comparison(
    world: World, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = run("compare", world.base, world.fork, "--price", "100").stdout
    # Two devices for 22 s and 25 s.
    wanted = {
        "status": ["succeeded", "queued"],
        "name": ["geo/base", "geo/fork"],
        "steps": ["6 of 6", "2 of 8"],
        "attempts": ["2 (1 step again)"],
        "anomalies": ["1"],
        "last loss": ["1.7500", "3.0000"],
        "mean of last 5 %": ["1.7500", "3.0000"],
        "lowest loss": ["1.7500 at step 6", "3.0000 at step 2"],
        "last validation": ["2.7500"],
        "best validation": ["2.5000 at step 4"],
        "trained tokens": ["63", "17"],
        "tokens/s": ["8"],
        "MFU": ["43.7%"],
        "peak memory": ["286 MiB"],
        "goodput": ["24.5%", ""],
        "device-hours": ["0.0261 on 2 devices", "0 on 2 devices"],
        "cost": ["2.61", "0.00"],
        "optimizer.lr": ["1e-05", "0.0005"],
    }
    found = cells(shown.replace("config  ", ""), tuple(wanted))
    assert {name: [cell for cell in row if cell] for name, row in found.items()} == {
        name: [cell for cell in row if cell] for name, row in wanted.items()
    }
    assert "A and B are the same bit for bit over the steps 1 to 2 that both have" in shown


def test_people_read_the_same_numbers_in_the_list(world: World, run: Callable[..., Result]) -> None:
    columns = "name,status,step,loss,val,took,try,size,user"
    shown = run("ls", "--columns", columns).stdout
    wanted = {
        "geo/base": ["succeeded", "6/6", "1.7500", "2.7500", "55s", "2", "8.0 kB", "ada"],
        "geo/going": ["running", "2/10", "3.0000", "20s left", "1", "ada"],
        "other/bad": ["failed", "1/6", "NaN", "9s", "1", "bob"],
        "geo/held": ["held", "0/6", "bob"],
    }
    assert cells(shown, tuple(wanted)) == wanted


def test_replay_has_the_milestones_and_the_state_of_then(world: World, ask: Ask) -> None:
    answer = ask("replay", world.base)
    assert set(answer) == {"run_id", "version", "milestones", "state"}
    assert (answer["run_id"], answer["version"]) == (world.base, len(rows(world, world.base)))
    assert answer["state"] == base_state(world)
    steps = [item for item in answer["milestones"] if item["type"] == "Steps"]

    def stretch(attempt: int, first: int, last: int, at: tuple[float, float], **more: Any) -> dict[str, Any]:
        mine = [
            row["version"]
            for row in rows(world, world.base)
            if row["type"] == "StepCompleted"
            and row["attempt"] == attempt
            and first <= json.loads(row["payload"])["step"] <= last
        ]
        return {
            "run_id": world.base,
            "type": "Steps",
            "attempt": attempt,
            "first": first,
            "last": last,
            "first_loss": STEPS[first][0],
            "last_loss": STEPS[last][0],
            "redone": False,
            "versions": [mine[0], mine[-1]],
            "times": [iso(world.at(t)) for t in at],
            "validations": [],
            "checkpoints": [],
            "anomalies": [],
        } | more

    assert steps == [
        stretch(1, 1, 3, (20, 30), validations=[[2, 3.5]], checkpoints=[2]),
        stretch(2, 3, 3, (50, 50), redone=True),
        stretch(
            2,
            4,
            6,
            (53, 60),
            validations=[[4, 2.5], [6, 2.75]],
            checkpoints=[6],
            anomalies=[[6, "loss_spike"]],
        ),
    ]
    others = [item for item in answer["milestones"] if item["type"] != "Steps"]
    kinds = "RunSubmitted AttemptClaimed AttemptFailed AttemptClaimed RunSucceeded CheckpointPinned"
    assert [item["type"] for item in others] == kinds.split()
    logged = {row["version"]: row for row in rows(world, world.base)}
    for item in others:
        row = logged[item["version"]]
        assert item == {
            "run_id": world.base,
            "type": row["type"],
            "version": row["version"],
            "occurred_at": iso(row["occurred_at"]),
            "attempt": row["attempt"],
            "payload": json.loads(row["payload"]),
        }
    then = ask("replay", world.base, "--until", "v" + str(version_of(world, world.base, "AttemptFailed")))
    assert (then["state"]["status"], then["state"]["step"], then["state"]["attempt"]) == ("retrying", 3, 1)
    assert (then["state"]["loss"], then["state"]["tokens_counted"]) == (2.5, tokens(3))


def test_gc_names_what_nothing_keeps(world: World, ask: Ask) -> None:
    assert ask("gc", "--dry-run") == []
    # The fork starts from step 2: it stays, whatever is asked for.
    (six,) = ask("gc", world.base, "--all", "--dry-run")
    assert six.pop("what")
    assert six == {
        "run_id": world.base,
        "step": 6,
        "path": str(world.folder / world.base / "step-00000006"),
        "bytes": 6000,
        "is_gone": True,
    }


def test_notify_names_its_channels_and_no_secret(
    world: World, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask("notify") == []
    monkeypatch.setenv("SFTD_NOTIFY_WEBHOOK", "https://hooks.example.com/services/hush-hush")
    monkeypatch.setenv("SFTD_NOTIFY_COMMAND", "/opt/notify --token hush-hush")
    rows = ask("notify")
    assert [row["channel"] for row in rows] == ["command notify", "webhook at hooks.example.com"]
    for row in rows:
        assert set(row) == {"channel", "kinds", "pending", "error"}
        assert row["error"] is None


def test_a_copy_reports_rows_and_digest_of_each_table(
    world: World, shared_database_url: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run("db", "copy", shared_database_url, str(tmp_path / "copy.db"), "--force", "--json")
    answer = json.loads(done.stdout)
    with world.store.engine.connect() as connection:
        for name, table in answer.items():
            assert set(table) == {"rows", "sha256"}
            count = connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar()
            assert (name, table["rows"]) == (name, count)
    assert {"events", "queue"} <= set(answer)


# The commands whose answers this file compares with the log.
HERE = {
    "checkpoints",
    "compare",
    "db copy",
    "events",
    "gc",
    "lineage",
    "ls",
    "nodes",
    "notify",
    "queue",
    "replay",
    "show",
    "watch",
}


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", c) for sub, c in command.commands.items())


def test_every_answer_is_covered() -> None:
    having = {name for name, command in commands() if any("--json" in p.opts for p in command.params)}
    elsewhere = {name for name in having if any(f"{key} ".startswith(f"{name} ") for key in FIELDS)}
    assert having == HERE | elsewhere
    # Each of these is checked by a test that runs the command.
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    unchecked = [name for name in FIELDS if not any(f'fields.check("{name}"' in text for text in texts)]
    assert [name for name in unchecked if not name.startswith("plan ")] == []
