"""A run that has to stop for another one, and for a person, and continues. Real daemon, real torchrun, one device."""

from __future__ import annotations

import json

from sftd.launcher import processes
from tests.builders.holds import let_go
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home, at_step
from tests.builders.process.timelines import assert_log_holds_journals, timeline

# Checkpoints come from being stopped alone.
STEPS = ("trainer.max_steps=100", "trainer.save_interval=0")


def test_preempted_then_paused_then_killed_runs_leave_the_same_losses(home: Home) -> None:
    home.env["SFTD_CPU_SLOTS"] = "1"
    low = home.submit(*STEPS, "launch.preemptible=true")
    high = home.submit(*STEPS, "launch.priority=5")
    last = home.submit(*STEPS, "--after", low)
    home.run("hold", high)
    for run_id, number in ((low, 1), (high, 1), (low, 2), (last, 1)):
        home.hold_at(run_id, 20 * number, number)
    daemon = home.start_daemon()

    # The held run is released while the other one trains, and takes its place.
    ranks = home.held(low)
    home.run("release", high)
    until(home.attempt(low).stop_requested, "the daemon does not make room")
    let_go(ranks.values())
    preempted = home.follow(low, lambda e: e["type"] == "AttemptPreempted")["payload"]
    assert preempted["by_run"] == high
    assert preempted["step"] == 21
    ranks = home.held(high)
    home.follow(high, at_step(20))
    queue = {row["run_id"]: row for row in json.loads(home.run("queue", "--json").stdout)}
    assert (queue[low]["status"], queue[low]["kind"]) == ("queued", "devices")
    assert queue[low]["starts_at"] is not None, "the pace of the running one is known"
    assert (queue[last]["kind"], queue[last]["waits_for"]) == ("after", f"{low} (queued)")
    let_go(ranks.values())

    # It continues by itself once the other one has succeeded, and is paused by a person.
    ranks = home.held(low, 2)
    home.run("pause", low, "--reason", "lunch")
    until(home.attempt(low, 2).stop_requested, "the daemon does not ask the trainer to stop")
    let_go(ranks.values())
    paused = home.follow(low, lambda e: e["type"] == "AttemptPaused")["payload"]
    shown = home.show(low)
    assert (shown["status"], shown["step"]) == ("paused", paused["step"])
    assert paused["step"] == 41
    home.run("resume", low)
    home.wait(low, "succeeded")

    # What was submitted --after it starts now, and is killed before it can save anything.
    home.held(last)
    home.run("cancel", last, "--now")
    killed = home.wait(last, "cancelled")
    assert killed["checkpoints"] == []
    assert processes.survivors(home.attempt(last).order().token) == []
    daemon.terminate()
    assert daemon.wait(timeout=PATIENCE) == 0

    shown = home.show(low)
    assert (shown["attempt"], shown["preemptions"], shown["steps_redone"]) == (3, 1, 0)
    # A loss that jumps is one in both; a step that came out otherwise would be one more.
    assert shown["anomalies"] == home.show(high)["anomalies"]
    assert not home.events(low, "AttemptFailed", "AttemptLost")
    assert timeline(home, low) == timeline(home, high), "undisturbed, the numbers are the same"
    assert len(timeline(home, low)) == 100
    assert_log_holds_journals(home, low)
