"""A run that has to stop for another one, and for a person, and goes on. Real daemon, real torchrun, one device."""

from __future__ import annotations

import json

import pytest

from sftd.launcher import processes
from tests.process.harness import Home, at_step
from tests.process.test_recovery import assert_log_holds_journals, timeline

pytestmark = pytest.mark.slow

# Long enough that a command lands in the middle; checkpoints come from being stopped alone.
STEPS = ("trainer.max_steps=1000", "trainer.save_interval=0")


def test_preempted_then_paused_then_killed_runs_leave_the_same_losses(home: Home) -> None:
    home.env["SFTD_CPU_SLOTS"] = "1"
    low = home.submit(*STEPS, "launch.preemptible=true")
    high = home.submit(*STEPS, "launch.priority=5")
    last = home.submit(*STEPS, "--after", low)
    home.run("hold", high)
    daemon = home.start_daemon()

    # The held run is released while the other one trains, and takes its place.
    home.follow(low, at_step(20))
    home.run("release", high)
    preempted = home.follow(low, lambda e: e["type"] == "AttemptPreempted")["payload"]
    assert preempted["by_run"] == high
    assert preempted["step"] >= 20
    home.follow(high, at_step(1))
    queue = {row["run_id"]: row for row in json.loads(home.run("queue", "--json").stdout)}
    assert (queue[low]["status"], queue[low]["kind"]) == ("queued", "devices")
    assert queue[low]["starts_at"] is not None, "the pace of the running one is known"
    assert (queue[last]["kind"], queue[last]["waits_for"]) == ("after", f"{low} (queued)")

    # It goes on by itself once the other one has succeeded, and is paused by a person.
    home.follow(low, lambda e: e["type"] == "AttemptLaunched" and e["attempt"] == 2)
    home.run("pause", low, "--reason", "lunch")
    paused = home.follow(low, lambda e: e["type"] == "AttemptPaused")["payload"]
    shown = home.show(low)
    assert (shown["status"], shown["step"]) == ("paused", paused["step"])
    assert paused["step"] > preempted["step"]
    home.run("resume", low)
    home.wait(low, "succeeded")

    # What was submitted --after it starts now, and is killed before it can save anything.
    home.follow(last, lambda e: e["type"] == "AttemptLaunched")
    home.run("cancel", last, "--now")
    killed = home.wait(last, "cancelled")
    assert killed["checkpoints"] == []
    assert processes.survivors(home.attempt(last).order().token) == []
    daemon.terminate()
    assert daemon.wait(timeout=60) == 0

    shown = home.show(low)
    assert (shown["attempt"], shown["preemptions"], shown["steps_redone"]) == (3, 1, 0)
    # A loss that jumps is one in both; a step that came out otherwise would be one more.
    assert shown["anomalies"] == home.show(high)["anomalies"]
    assert not home.events(low, "AttemptFailed", "AttemptLost")
    assert timeline(home, low) == timeline(home, high), "undisturbed, the numbers are the same"
    assert len(timeline(home, low)) == 1000
    assert_log_holds_journals(home, low)
