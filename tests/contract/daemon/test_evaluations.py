"""Evaluations that a daemon runs: each end is an event, none runs twice, and training has the devices first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sftd.daemon.loop import Daemon
from sftd.domain.errors import Refused
from sftd.domain.log import events as e
from sftd.domain.run import evaluations as decisions
from sftd.domain.run.retention import why_kept
from sftd.domain.run.state import EvaluationState, Run
from sftd.domain.spec.evaluation_section import CommandEvaluation
from sftd.domain.spec.spec import Spec
from sftd.launcher import evaluation as launched
from sftd.launcher import processes
from sftd.launcher.inventory import Inventory
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts, evaluations
from sftd.operations.queries import model_files
from sftd.operations.queries.runs import find_run
from sftd.settings import read
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from sftd.wire.attempt.journal import Line
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC
from tests.builders.patience import PATIENCE
from tests.builders.process.idle_launcher import Launcher

GOOD = """echo '{"exact_match": 0.5, "tokens": 12}'"""
ENV = """test "$SFTD_EVALUATION_NAME $SFTD_EVALUATION_STEP" = "env 1" && test -z "$SFTD_NOTIFY_WEBHOOK" && echo '{"ok": 1}'"""


def command(name: str, script: str, **more: Any) -> CommandEvaluation:
    return CommandEvaluation(name=name, argv=["sh", "-c", script], **more)


@pytest.fixture
def daemon(log: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Daemon]]:
    """Daemons on two cores. The export of a checkpoint does nothing."""
    monkeypatch.setattr(launched, "tool_argv", lambda *_: ["true"])
    monkeypatch.setattr(model_files, "source", lambda *_: "")
    monkeypatch.setenv("SFTD_NOTIFY_WEBHOOK", "https://secret.example")
    settings = read({"SFTD_HOME": str(tmp_path), "SFTD_CPU_SLOTS": "2", "MLFLOW_TRACKING_URI": ""})
    made: list[Daemon] = []

    def make() -> Daemon:
        made.append(Daemon(log, settings, Inventory(0, 2), launcher=Launcher()))
        made[-1]._register()
        return made[-1]

    yield make
    for each in made:
        each._evaluator.end(may_write=False)


def submit(log: Store, *evaluation: CommandEvaluation) -> str:
    spec: Spec = msgspec.structs.replace(SPEC, evaluation=list(evaluation))
    return submit_all(log, CONTEXT, [Wish(spec, Preflight(SHAPE, FACTS, None, 3, []))], "ada")[0]


def publish(log: Store, folder: Path, *evaluation: CommandEvaluation) -> str:
    """A run that another daemon drives, with a checkpoint of step 1 on this host."""
    run_id = submit(log, *evaluation)
    claimed = attempts.claim(log, CONTEXT, daemon="d", host="h", fits=lambda entry: True, lease_micros=LEASE)
    assert claimed is not None
    folder.mkdir(exist_ok=True)
    published = e.CheckpointPublished(step=1, path=str(folder), bytes=1, manifest_digest="m", seconds=1.0)
    told = [Line(number=n, occurred_at=n, event=event) for n, event in enumerate((step(1), published), 1)]
    attempts.record(log, CONTEXT, claimed.lease, told, 20, {})
    return run_id


def until(daemon: Daemon, is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_done():
        assert time.monotonic() < deadline
        daemon.tick()
        time.sleep(0.01)


def states(log: Store, run_id: str) -> dict[str, EvaluationState]:
    return {x.name: x for x in find_run(log, run_id).evaluations}


def told(log: Store, run_id: str) -> list[tuple[str, str, Any]]:
    """(type, name, what matters) of the run's evaluation events."""
    with log.read() as connection:
        recorded = list(event_store.read_stream(connection, run_id))
    return [
        (
            r.type.removeprefix("Evaluation"),
            r.event.name,
            getattr(r.event, "cause", getattr(r.event, "reason", None)),
        )
        for r in recorded
        if r.type.startswith("Evaluation")
    ]


def test_each_end_of_an_evaluation_is_an_event(
    log: Store, daemon: Callable[[], Daemon], tmp_path: Path
) -> None:
    run_id = publish(
        log,
        tmp_path / "c",
        command("good", GOOD),
        command("env", ENV),
        command("nonsense", "echo hello; echo '\033[31m'"),
        command("exits", "echo broken >&2; exit 3"),
        command("killed", "kill -9 $$"),
        command("hangs", "sleep 600 & sleep 600", timeout_seconds=1),
        command("asked", GOOD, at_checkpoints=False),
    )
    assert {x.status for x in states(log, run_id).values()} == {"pending"}
    before = find_run(log, run_id)
    assert "evaluation good is pending" in why_kept(before)[1]
    until(daemon(), lambda: not any(x.is_open for x in states(log, run_id).values()))
    found = states(log, run_id)
    assert (found["good"].status, found["good"].metrics) == ("done", {"exact_match": 0.5, "tokens": 12.0})
    assert found["env"].metrics == {"ok": 1.0}
    assert {name: x.message.partition(": ")[0] for name, x in found.items() if x.status == "failed"} == {
        "nonsense": "output",
        "exits": "error",
        "killed": "killed",
        "hangs": "timeout",
    }
    assert found["nonsense"].message.startswith(
        "output: it must print one JSON object of numbers, and printed 'hello"
    )
    assert found["nonsense"].message.isprintable()
    assert found["exits"].message == "error: broken"
    # One that was killed starts again once; no other does.
    starts = [name for kind, name, _ in told(log, run_id) if kind == "Started"]
    assert {name: starts.count(name) for name in starts} == {name: 1 + (name == "killed") for name in found}
    assert "asked" not in found
    # The run and its checkpoint are as before.
    after = find_run(log, run_id)
    assert (after.status, after.step, after.checkpoints) == (before.status, before.step, before.checkpoints)
    assert why_kept(after)[1] == ["last"]
    assert not any(processes.survivors(launched.token_of(run_id, x)) for x in found.values())


def test_an_evaluation_makes_room_for_a_run_and_runs_once_on_two_daemons(
    log: Store, daemon: Callable[[], Daemon], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run_id = publish(
        log, tmp_path / "c", command("slow", f"while ! test -e {go}; do sleep 0.01; done; {GOOD}")
    )
    one, two = daemon(), daemon()
    (seen,) = evaluations.waiting(log)
    one.tick()
    # Another daemon saw it wait at the same moment.
    assert evaluations.start(log, CONTEXT, seen, daemon="another", devices=[]) is None
    two.tick()
    (started,) = one._evaluator._running
    assert two._evaluator._running == []
    two._evaluator.recover()
    assert told(log, run_id) == [("Started", "slow", None)]
    waits = submit(log)
    one.tick()
    assert one._evaluator._running == []
    assert processes.survivors(started.process.token) == []
    assert list(one._driven.supervisors) == [waits]
    assert told(log, run_id)[1:] == [("Interrupted", "slow", f"made room for {waits}")]
    # While the run trains here nothing starts; another host is free.
    one.tick()
    one._evaluator._look_at = 0.0
    one.tick()
    assert one._evaluator._running == []
    go.touch()
    until(two, lambda: not states(log, run_id)["slow"].is_open)
    assert states(log, run_id)["slow"].tries == 1


def test_an_evaluation_whose_daemon_was_killed_starts_again_once_and_its_late_result_is_refused(
    log: Store, daemon: Callable[[], Daemon], tmp_path: Path
) -> None:
    run_id = publish(log, tmp_path / "c", command("slow", "sleep 600"))
    one = daemon()
    one.tick()
    (running,) = one._evaluator._running
    # The program runs, not the export before it.
    until(one, lambda: not running.process._stages)
    # The pipe closes as when the daemon is killed.
    assert running.process._child.stdin is not None
    running.process._child.stdin.close()
    running.process._child.wait(PATIENCE)
    ended = time.monotonic() + PATIENCE
    while processes.survivors(running.process.token):
        assert time.monotonic() < ended
    one._unregister()
    two = daemon()
    two._evaluator.recover()
    assert told(log, run_id) == [("Started", "slow", None), ("Failed", "slow", "lost")]
    two.tick()
    (again,) = two._evaluator._running
    late = decisions.failed(running.started.state, "error", "late")
    assert not evaluations.end(log, CONTEXT, running.started, late)
    two._unregister()
    three = daemon()
    three._evaluator.recover()
    assert states(log, run_id)["slow"].status == "failed"
    assert processes.survivors(again.process.token) == []
    # A user gives it up, and asks for it again.
    run = find_run(log, run_id)
    asked = decisions.request(run, None, None, "ada")
    assert asked == (1, [e.EvaluationRequested(name="slow", step=1, by="ada")])


@pytest.mark.parametrize(
    "printed", [{}, {"x": "high"}, {"x": True}, {"x": float("inf")}, {"x": None}, {"\x1b[31m": 1}]
)
def test_a_metric_is_a_finite_number_with_a_plain_name(printed: dict[str, Any]) -> None:
    with pytest.raises(launched.Unusable) as refused:
        launched.usable_metrics(printed, "what it printed")
    assert str(refused.value).isprintable()
    assert launched.usable_metrics({"a/b": 1, "c": 0.5}, "") == {"a/b": 1.0, "c": 0.5}


def test_what_is_requested_must_exist() -> None:
    spec: Spec = msgspec.structs.replace(SPEC, evaluation=[command("a", GOOD)])
    for run, name in ((Run("r"), None), (Run("r", spec=spec), None), (Run("r", spec=spec), "b")):
        with pytest.raises(Refused):
            decisions.request(run, None, name, "ada")
