"""Runs that a real Slurm trains, on two "hosts": real daemon, real torchrun, real kills."""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from sftd.launcher.slurm import doctor as doctor_slurm
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.remains import find_remains
from tests.builders.holds import let_go
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home, at_step
from tests.builders.process.slurm_cluster import NODES, SlurmCluster
from tests.builders.process.timelines import assert_log_holds_journals, timeline

ON_SLURM = "launch.launcher=slurm"
STEPS = 600
LONG = (
    f"trainer.max_steps={STEPS}",
    "trainer.save_interval=50",
    "data.val_files=[]",
    "training.spike_factor=0",
)


@pytest.fixture
def home(slurm: SlurmCluster, home: Home) -> Home:
    """A home on a cluster: it asks Slurm often."""
    home.env |= {"SFTD_SLURM_POLL_SECONDS": "0.3", "SLURM_CONF": str(slurm.conf)}
    return home


def job_of(home: Home, run_id: str, number: int = 1) -> str:
    """The number of an attempt's job."""
    process = home.attempt(run_id, number).process()
    assert process is not None
    assert process.job
    return process.job


def in_attempt(number: int, step: int = 0) -> Callable[[dict[str, Any]], bool]:
    """Matches a step of this attempt, from `step` on."""
    return lambda event: event["attempt"] == number and at_step(step)(event)


def ended(number: int) -> Callable[[dict[str, Any]], bool]:
    """Matches the event with which this attempt ended before its run did."""
    kinds = ("AttemptPreempted", "AttemptPaused", "AttemptLost", "AttemptFailed")
    return lambda event: event["attempt"] == number and event["type"] in kinds


def reported(state: str) -> Callable[[dict[str, Any]], bool]:
    """Matches what Slurm said of a job."""
    return lambda event: event["type"] == "JobReported" and event["payload"]["state"] == state


def wake_once_signalled(attempt: AttemptDir, ranks: list[psutil.Process]) -> None:
    """Resume ranks as soon as Slurm has signalled their job that its end is near."""
    until(lambda: attempt.told() == "USR1")
    let_go(ranks)


@pytest.mark.timeout(1800)
def test_whatever_slurm_does_the_run_goes_on_as_if_nothing_had_been(home: Home, slurm: SlurmCluster) -> None:
    """Its controller away for a minute, requeued, signalled, cancelled from outside, its node lost, its time over: each ends
    in the right state, no event is lost or doubled, and the steps equal those of an undisturbed run."""
    # On a node that nothing else happens to, stopped where they are until their time is over.
    killed, told = (
        home.submit(
            *LONG, ON_SLURM, f"launch.slurm.exclude={NODES[0]}", f"launch.slurm.stop_seconds={seconds}"
        )
        for seconds in (1, 90)
    )
    for other in (killed, told):
        home.hold_at(other, 60)
    began = time.monotonic()
    daemon, undisturbed, through = a_minute_without_a_controller(home, slurm, killed)
    run_id = home.submit(*LONG, ON_SLURM, f"launch.slurm.extra_args=[--nodelist={NODES[0]}]")
    for number, step in enumerate((60, 110, 160, 200), 1):
        home.hold_at(run_id, step, number)
    # Signalled half a minute from now, or later: Slurm looks every half minute only.
    ranks = list(home.held(told).values())
    slurm.limit(job_of(home, told), math.ceil((time.monotonic() - began) / 60) + 2)
    alarm = threading.Thread(target=wake_once_signalled, args=(home.attempt(told), ranks), daemon=True)
    alarm.start()

    # Slurm puts the job back into its queue, which --no-requeue forbids to all but those who insist.
    home.held(run_id, 1)
    job = job_of(home, run_id, 1)
    slurm.run("scontrol", "update", f"JobId={job}", "Requeue=1")
    slurm.run("scontrol", "requeue", job)
    event = home.follow(run_id, ended(1))
    assert (event["type"], event["payload"]["reason"]) == (
        "AttemptPreempted",
        f"Slurm put job {job} back into its queue",
    )
    until(lambda: slurm.state(job) == "CANCELLED", what=slurm.state(job))

    # What --signal sends ahead of the time limit and at a preemption: a checkpoint is saved first.
    ranks = list(home.held(run_id, 2).values())
    slurm.run("scancel", "--batch", "--signal=USR1", job_of(home, run_id, 2))
    wake_once_signalled(home.attempt(run_id, 2), ranks)
    event = home.follow(run_id, ended(2))
    last = [e["payload"]["step"] for e in home.events(run_id, "StepCompleted") if e["attempt"] == 2][-1]
    assert (event["type"], event["payload"]["step"]) == ("AttemptPreempted", last)
    assert last < STEPS

    # A person cancels the job with scancel: the run is paused.
    home.held(run_id, 3)
    job = job_of(home, run_id, 3)
    slurm.run("scancel", job)
    event = home.follow(run_id, ended(3))
    assert (event["type"], event["payload"]["by"]) == ("AttemptPaused", f"scancel of job {job}")
    home.run("resume", run_id)

    # The node's slurmd dies, and Slurm takes the node for lost, though the ranks live: they may write no more.
    ranks = list(home.held(run_id, 4).values())
    zombies = home.attempt(run_id, 4)
    slurm.kill_slurmd(NODES[0])
    event = home.follow(run_id, ended(4))
    assert event["type"] == "AttemptLost"
    assert "NODE_FAIL" in event["payload"]["message"]
    before = zombies.journal.read_bytes()
    let_go(ranks)
    psutil.wait_procs(ranks, timeout=PATIENCE)
    assert not any(rank.is_running() for rank in ranks)
    # On their own host the daemon kills them before it starts the next attempt, perhaps before they can say why they end.
    # That the fence alone ends them is proven in tests/trainer/test_fence.py.
    errors = {error.exception.split(":")[0] for error in find_remains(zombies).rank_errors}
    assert errors <= {"GivenUp"}
    assert zombies.journal.read_bytes() == before
    slurm.kill_node(NODES[0])
    slurm.start_node(NODES[0])

    # Over their time: one signalled before, one killed outright.
    alarm.join()
    event = home.follow(told, ended(1))
    assert (event["type"], "signalled" in event["payload"]["reason"]) == ("AttemptPreempted", True)
    (saved, made) = (
        [e["payload"]["step"] for e in home.events(told, kind) if e["attempt"] == 1][-1]
        for kind in ("CheckpointPublished", "StepCompleted")
    )
    assert event["payload"]["step"] == saved == made
    event = home.follow(killed, ended(1))
    assert event["type"] == "AttemptPreempted"
    assert "time limit" in event["payload"]["reason"]

    home.wait(undisturbed, "succeeded")
    expected = timeline(home, undisturbed)
    assert len(expected) == STEPS
    for other, attempts in ((through, 1), (run_id, 5), (killed, 2), (told, 2)):
        shown = home.wait(other, "succeeded")
        assert (shown["attempt"], shown["anomalies"]) == (attempts, 0)
        assert timeline(home, other) == expected
        assert_log_holds_journals(home, other)
    daemon.terminate()
    daemon.wait(timeout=PATIENCE)


def a_minute_without_a_controller(
    home: Home, slurm: SlurmCluster, killed: str
) -> tuple[subprocess.Popen[str], str, str]:
    """slurmctld is stopped for a minute by the clock. Meanwhile a job trains to its end, the time of another (`killed`)
    passes, a waiting one is cancelled, and the daemon is killed.

    Returns the new daemon, a run that Slurm has nothing to do with, and the one that trained.
    """
    log = home.path / "daemon.log"
    through = home.submit(*LONG, ON_SLURM, f"launch.slurm.extra_args=[--nodelist={NODES[0]}]")
    home.hold_at(through, 60)
    waiting = home.submit(*LONG, ON_SLURM, "launch.slurm.extra_args=[--begin=now+1hour]")
    daemon = home.start_daemon()
    ranks = home.held(through).values()
    home.held(killed)
    home.follow(waiting, reported("PENDING"))
    slurm.limit(job_of(home, killed), 1)
    slurm.stop_controller()
    gone = time.monotonic()

    home.run("cancel", waiting)
    event = home.follow(waiting, lambda e: "not cancelled yet" in e["payload"].get("reason", ""))
    assert "Unable to contact slurm controller" in event["payload"]["reason"]
    until(lambda: "cannot be observed now" in log.read_text())
    daemon.kill()
    daemon.wait()
    known = len(log.read_text())
    daemon = home.start_daemon()
    for other in (through, waiting):
        home.follow(other, lambda e: e["type"] == "AttemptAdopted")
    until(lambda: "cannot be observed now" in log.read_text()[known:])

    # It trains to its end, is taken in as it goes, and nobody calls it dead.
    recorded = home.show(through)["step"]
    let_go(ranks)
    home.follow(through, in_attempt(1, recorded + 5))
    until(lambda: home.attempt(through).exit_code() == 0)
    undisturbed = home.submit(*LONG)
    home.follow(through, in_attempt(1, STEPS))
    home.follow(through, reported("NOT OBSERVED"))
    assert (
        "not observed (Slurm does not answer: Unable to contact slurm controller" in home.run("queue").stdout
    )
    assert [f.state for f in doctor_slurm.examine(None)] == ["ok", "warning"]
    assert (home.show(through)["step"], home.show(through)["attempt"]) == (STEPS, 1)
    assert home.show(waiting)["status"] == "stopping"
    until(lambda: time.monotonic() - gone > 60)
    slurm.start_controller()

    home.wait(waiting, "cancelled")
    assert slurm.state(job_of(home, waiting)) == "CANCELLED"
    return daemon, undisturbed, through


def test_the_same_config_runs_here_on_slurm_and_on_two_hosts(home: Home, slurm: SlurmCluster) -> None:
    here = home.submit("launch.nproc_per_node=2")
    there = home.submit("launch.nproc_per_node=2", ON_SLURM)
    apart = home.submit("launch.nnodes=2", "launch.nproc_per_node=1", ON_SLURM)
    home.drain()
    for run_id in (here, there, apart):
        assert home.show(run_id)["status"] == "succeeded", home.run("logs", run_id).stdout
        assert_log_holds_journals(home, run_id)
        assert timeline(home, run_id) == timeline(home, here)
    nodes = [e["payload"]["nodes"] for e in home.events(apart, "JobReported")]
    assert f"{NODES[0][:-1]}[1-2]" in nodes
    # Nobody holds a device of this host for a job.
    (launched,) = home.events(there, "AttemptLaunched")
    assert launched["payload"]["devices"] == ["slurm:0"]


def test_doctor_looks_at_it(home: Home, slurm: SlurmCluster) -> None:
    commands, controller, partitions = doctor_slurm.examine(None)
    assert [f.state for f in (commands, controller, partitions)] == ["ok"] * 3
    assert commands.said.startswith("slurm")
    assert "the controller answers" in controller.said
    assert partitions.said == "partitions: main* (2 of 2 nodes, no time limit)"
