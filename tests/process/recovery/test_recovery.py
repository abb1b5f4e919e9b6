"""What must hold when things die: ranks, daemons, checkpoints. Real daemon, real torchrun, real kills."""

from __future__ import annotations

import json
import signal
import sqlite3
from typing import Any

import psutil
import pytest

from tests.builders.holds import let_go
from tests.builders.log.view_rows import view_rows
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home, at_step
from tests.builders.process.timelines import assert_log_holds_journals, timeline

LONG = ("trainer.max_steps=120", "trainer.save_interval=20")


def assert_time_adds_up(home: Home, shown: dict[str, Any]) -> dict[str, float]:
    """Every second between submission and end has one account, and steps took the time that they say."""
    spent: dict[str, float] = dict(shown["goodput"])
    share, wall = spent.pop("goodput"), spent.pop("wall")
    assert wall == pytest.approx((shown["ended_at"] - shown["submitted_at"]) / 1e6, abs=1e-6)
    assert sum(spent.values()) == pytest.approx(wall, abs=1e-6)
    assert 0 < share == pytest.approx(spent["productive"] / (wall - spent["queued"] - spent["idle"]))
    events = home.events(shown["run_id"])
    steps = sum(e["payload"]["seconds"] for e in events if e["type"] == "StepCompleted")
    # Events lie a little closer together than what they report at times: the clocks are not the same.
    assert spent["productive"] + spent["replayed"] == pytest.approx(steps, rel=0.1)
    assert spent["checkpointing"] > 0
    return spent


def test_killed_ranks_resume_bit_for_bit(home: Home) -> None:
    undisturbed = home.submit(*LONG)
    crashed = home.submit(*LONG)
    home.hold_at(crashed, 45)
    daemon = home.start_daemon("--drain")
    home.held(crashed)
    home.kill_ranks(crashed)
    shown = home.wait(crashed, "succeeded")
    assert daemon.wait(timeout=PATIENCE) == 0

    assert shown["attempt"] == 2
    assert shown["steps_redone"] == 5
    assert shown["anomalies"] == 0
    assert timeline(home, crashed) == timeline(home, undisturbed)
    failed = home.events(crashed, "AttemptFailed")[0]["payload"]
    assert failed["cause"] == "killed"
    assert any("SIGKILL" in line or "exitcode" in line for line in failed["evidence"])
    resumed = home.events(crashed, "TrainingResumed")[0]["payload"]
    assert resumed["step"] == 40
    assert_log_holds_journals(home, crashed)
    told = [assert_time_adds_up(home, shown), assert_time_adds_up(home, home.show(undisturbed))]
    assert [spent["replayed"] > 0 and spent["restarting"] > 0 for spent in told] == [True, False]
    assert "goodput" in home.run("show", crashed).stdout
    # The default policy keeps two, and the best of what was validated.
    assert {c["step"] for c in shown["checkpoints"]} >= {100, 120}
    assert not (home.attempt(crashed).path.parent / "checkpoints" / "step-00000020").exists()


def test_training_survives_the_daemon(home: Home) -> None:
    run_id = home.submit(*LONG)
    home.hold_at(run_id, 10)
    first = home.start_daemon()
    held = home.held(run_id)
    first.send_signal(signal.SIGKILL)
    first.wait()
    process = home.attempt(run_id).process()
    assert process is not None
    torchrun = psutil.Process(process.pid)
    assert torchrun.is_running()
    let_go(held.values())
    # It continues without any daemon, to its end.
    until(lambda: home.attempt(run_id).exit_code() == 0, "it does not end")
    psutil.wait_procs([torchrun], timeout=60)

    home.drain()
    shown = home.wait(run_id, "succeeded")
    assert shown["attempt"] == 1
    assert len(home.events(run_id, "AttemptAdopted")) == 1
    assert [e["payload"]["step"] for e in home.events(run_id, "StepCompleted")] == list(range(1, 121))
    assert_log_holds_journals(home, run_id)


def test_a_new_daemon_adopts_living_training(home: Home) -> None:
    run_id = home.submit("trainer.max_steps=100", "trainer.save_interval=0")
    home.hold_at(run_id, 5)
    first = home.start_daemon()
    held = home.held(run_id)
    home.follow(run_id, at_step(5))
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=PATIENCE) == 0
    assert all(rank.is_running() for rank in held.values())

    second = home.start_daemon("--drain")
    home.follow(run_id, lambda e: e["type"] == "AttemptAdopted")
    let_go(held.values())
    assert home.wait(run_id, "succeeded")["attempt"] == 1
    assert second.wait(timeout=PATIENCE) == 0
    assert_log_holds_journals(home, run_id)


def test_views_rebuilt_from_events_are_equal(home: Home) -> None:
    home.submit()
    failed = home.submit("trainer.experiment_name=other")
    (home.path / "train.parquet").rename(home.path / "gone.parquet")
    home.drain()
    shown = home.show(failed)
    assert shown["status"] == "failed"
    assert shown["attempt"] == 1, "a user's error is not retried"
    assert shown["cause"] == "user error", shown["message"]
    # What the rank said, by torchrun's own hand where `logs` looks for it.
    assert "[attempt 1 · rank 0] " in home.run("logs", failed).stdout
    database = f"sqlite:///{home.path}/home/sftd.db"
    before = view_rows(database)
    assert len(before) >= 2
    home.run("views", "rebuild")
    assert view_rows(database) == before


def test_everything_is_killed_at_once_and_all_views_are_deleted(home: Home) -> None:
    """The log is the truth: whatever else was lost, it says what was."""
    held = home.submit("trainer.experiment_name=held")
    home.run("hold", held)
    run_id = home.submit("trainer.max_steps=60", "trainer.save_interval=20")
    home.hold_at(run_id, 25)
    daemon = home.start_daemon()
    home.held(run_id)
    home.follow(run_id, at_step(25))
    process = home.attempt(run_id).process()
    assert process is not None
    doomed = [psutil.Process(pid) for pid in (daemon.pid, process.pid)]
    doomed += [child for parent in doomed for child in parent.children(recursive=True)]
    for each in doomed:
        each.kill()
    daemon.wait()
    psutil.wait_procs(doomed, timeout=60)

    before = view_rows(f"sqlite:///{home.path}/home/sftd.db")
    with sqlite3.connect(home.path / "home" / "sftd.db") as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        projections = [name for name in tables if name.startswith("view_")]
        assert len(projections) >= 3
        for name in (*projections, "projection_positions"):
            database.execute(f"DELETE FROM {name}")
        log = database.execute("SELECT run_id, type, payload FROM events ORDER BY position").fetchall()
    database.close()

    listed = {row["run_id"]: row for row in json.loads(home.run("ls", "--json").stdout)}
    assert view_rows(f"sqlite:///{home.path}/home/sftd.db") == before
    assert listed.keys() == {run for run, _, _ in log}
    steps = [json.loads(payload) for run, name, payload in log if (run, name) == (run_id, "StepCompleted")]
    assert (listed[run_id]["step"], listed[run_id]["loss"]) == (steps[-1]["step"], steps[-1]["loss"])
    assert [listed[run]["status"] for run in (run_id, held)] == ["running", "held"]
    # What was not ingested before the kill is in the journal, and is ingested now.
    home.drain()
    assert home.wait(run_id, "succeeded")["attempt"] == 2
    assert_log_holds_journals(home, run_id)
    assert home.run("db", "check").returncode == 0


def assert_no_port_is_open_to_the_network(home: Home, daemon: int) -> None:
    """The daemon listens nowhere; torchrun and the ranks on the loopback device alone."""
    listening: dict[int, list[str]] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("SFTD_HOME") == home.env["SFTD_HOME"]:
                sockets = process.net_connections(kind="inet")
                # Of UDP none is expected, and it would have no state.
                listening[process.pid] = [s.laddr.ip for s in sockets if s.status in ("LISTEN", "NONE")]
        except (psutil.Error, OSError):
            continue
    assert listening[daemon] == []
    addresses = {address for found in listening.values() for address in found}
    assert addresses == {"127.0.0.1"}, listening


def test_cancel_checkpoints_and_resume_goes_on(home: Home) -> None:
    run_id = home.submit("trainer.max_steps=100", "trainer.save_interval=0")
    home.hold_at(run_id, 20)
    daemon = home.start_daemon()
    held = home.held(run_id)
    assert_no_port_is_open_to_the_network(home, daemon.pid)
    home.run("cancel", run_id, "--reason", "lunch")
    until(home.attempt(run_id).stop_requested, "the daemon does not ask the trainer to stop")
    let_go(held.values())
    shown = home.wait(run_id, "cancelled")
    # The wish to stop is heard in the next step.
    stopped_at = shown["step"]
    assert stopped_at == 21
    assert [c["step"] for c in shown["checkpoints"]] == [stopped_at]

    home.run("resume", run_id)
    home.follow(run_id, lambda e: e["type"] == "TrainingResumed")
    shown = home.wait(run_id, "succeeded")
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=PATIENCE) == 0
    assert shown["steps_redone"] == 0
    assert shown["step"] == 100
    assert_log_holds_journals(home, run_id)


def test_resume_from_an_earlier_step_redoes_the_same(home: Home) -> None:
    run_id = home.submit("checkpoint.keep_last=5", "trainer.save_interval=4")
    home.drain()
    before = timeline(home, run_id)
    refused = home.run("resume", run_id, check=2)
    assert "--from-step" in refused.stderr
    refused = home.run("resume", run_id, "--from-step", "3", check=2)
    assert "0, 4, 8, 12" in refused.stderr
    home.run("resume", run_id, "--from-step", "4")
    home.drain()
    shown = home.show(run_id)
    assert shown["status"] == "succeeded"
    assert shown["steps_redone"] == 8
    assert shown["anomalies"] == 0
    assert timeline(home, run_id) == before


def test_a_damaged_checkpoint_is_rejected_and_the_one_before_used(home: Home) -> None:
    run_id = home.submit("checkpoint.keep_last=5", "trainer.save_interval=4")
    home.drain()
    folder = home.attempt(run_id).path.parent / "checkpoints" / "step-00000008"
    victim = max((f for f in folder.rglob("*") if f.suffix == ".distcp"), key=lambda f: f.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    home.run("resume", run_id, "--from-step", "8")
    home.drain()
    shown = home.show(run_id)
    assert shown["status"] == "succeeded"
    assert shown["anomalies"] == 0
    rejected = home.events(run_id, "CheckpointRejected")[0]["payload"]
    assert rejected["step"] == 8
    assert victim.name in rejected["reason"]
    assert home.events(run_id, "TrainingResumed")[-1]["payload"]["step"] == 4


def test_a_crash_loop_ends_with_an_explanation(home: Home) -> None:
    run_id = home.submit(
        "trainer.max_steps=100",
        "trainer.save_interval=0",
        "launch.min_progress_steps=100",
        "launch.max_restarts=1",
    )
    for number in (1, 2):
        home.hold_at(run_id, 3, number)
    daemon = home.start_daemon()
    for number in (1, 2):
        home.held(run_id, number)
        home.kill_ranks(run_id, number)
    shown = home.wait(run_id, "failed")
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(timeout=PATIENCE)
    assert shown["attempt"] == 2
    assert shown["cause"] == "crash loop"
    assert "2 attempts in a row" in shown["message"]


def test_data_parallel_run_in_two_ranks(home: Home) -> None:
    one = home.submit()
    two = home.submit("launch.nproc_per_node=2", "launch.threads_per_rank=1")
    home.drain()
    assert home.show(two)["status"] == "succeeded"
    for a, b in zip(home.events(one, "StepCompleted"), home.events(two, "StepCompleted"), strict=True):
        assert a["payload"]["samples_digest"] == b["payload"]["samples_digest"]
        assert b["payload"]["loss"] == pytest.approx(a["payload"]["loss"], rel=1e-5)
    listed = json.loads(home.run("ls", "--json").stdout)
    assert {row["run_id"]: row["status"] for row in listed} == {one: "succeeded", two: "succeeded"}


def test_a_hang_is_told_with_the_ranks_stacks_and_started_again(home: Home) -> None:
    run_id = home.submit(
        "trainer.max_steps=60",
        "trainer.save_interval=0",
        "launch.nproc_per_node=2",
        "launch.hang_seconds=5",
        # A busy machine may well do nothing for so long, and then it is a hang as well.
        "launch.max_restarts=100",
    )
    home.hold_at(run_id, 25)
    daemon = home.start_daemon("--drain")
    held = home.held(run_id)
    frozen = held[1].pid
    held[0].resume()
    home.wait(run_id, "succeeded")
    assert daemon.wait(timeout=PATIENCE) == 0

    failed, *more = [e["payload"] for e in home.events(run_id, "AttemptFailed")]
    assert failed["cause"] == "hang"
    assert "nothing was recorded for" in failed["message"]
    waiting, stopped = failed["evidence"]
    assert waiting.startswith("rank 0: ")
    assert "(distributed_c10d.py:" in waiting
    assert stopped == f"rank 1: pid {frozen} is stopped (SIGSTOP)"
    assert not psutil.pid_exists(frozen)
    assert {other["cause"] for other in more} <= {"hang"}
    assert home.show(run_id)["anomalies"] == 0
