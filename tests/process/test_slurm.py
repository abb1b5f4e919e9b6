"""Runs that a real Slurm trains, on two "hosts": real daemon, real torchrun, real kills."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from sftd.launcher import processes
from sftd.wire.attempt_dir import AttemptDir
from sftd.wire.remains import find_remains
from tests.process.harness import Home, at_step
from tests.process.slurm_cluster import NODES, SlurmCluster, until
from tests.process.test_recovery import assert_log_holds_journals, timeline

pytestmark = pytest.mark.slow

ON_SLURM = "launch.launcher=slurm"


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


def freeze(home: Home, run_id: str, number: int = 1) -> list[psutil.Process]:
    """Stop the ranks of an attempt where they are, so that what happens next happens to a living one."""
    ranks = [
        psutil.Process(pid) for pid in processes.ranks(home.attempt(run_id, number).order().token).values()
    ]
    assert ranks
    for rank in ranks:
        rank.suspend()
    return ranks


def in_attempt(number: int, step: int = 0) -> Callable[[dict[str, Any]], bool]:
    """Matches a step of this attempt, from `step` on."""
    return lambda event: event["attempt"] == number and at_step(step)(event)


def ended(number: int) -> Callable[[dict[str, Any]], bool]:
    """Matches the event with which this attempt ended before its run did."""
    kinds = ("AttemptPreempted", "AttemptPaused", "AttemptLost", "AttemptFailed")
    return lambda event: event["attempt"] == number and event["type"] in kinds


def wake_once_told(attempt: AttemptDir, ranks: list[psutil.Process]) -> None:
    """Let ranks go on as soon as Slurm has told their job that its end is near."""
    until(lambda: attempt.told() == "USR1", seconds=150)
    for rank in ranks:
        rank.resume()


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


@pytest.mark.timeout(900)
def test_whatever_slurm_does_the_run_goes_on_as_if_nothing_had_been(home: Home, slurm: SlurmCluster) -> None:
    """Requeued, told to end, cancelled from outside, its controller stopped, its node lost, its time over: each ends in the
    right state, no event is lost or doubled, and the steps come out as undisturbed."""
    settings = (
        "trainer.max_steps=1500",
        "trainer.save_interval=50",
        "data.val_files=[]",
        "training.spike_factor=0",
    )
    daemon = home.start_daemon()
    # On a node that nothing else happens to, stopped where they are until their time is over.
    killed, told = (
        home.submit(
            *settings, ON_SLURM, f"launch.slurm.exclude={NODES[0]}", f"launch.slurm.stop_seconds={seconds}"
        )
        for seconds in (1, 90)
    )
    for other in (killed, told):
        home.follow(other, in_attempt(1, 60))
        ranks = freeze(home, other)
        slurm.limit(job_of(home, other), 1 if other == killed else 2)
    # Slurm looks every half minute only; meanwhile there is enough to do.
    alarm = threading.Thread(target=wake_once_told, args=(home.attempt(told), ranks), daemon=True)
    alarm.start()
    run_id = home.submit(*settings, ON_SLURM, f"launch.slurm.extra_args=[--nodelist={NODES[0]}]")

    # Slurm puts the job back into its queue, which --no-requeue forbids to all but those who insist.
    home.follow(run_id, in_attempt(1, 60))
    freeze(home, run_id, 1)
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
    home.follow(run_id, in_attempt(2, 110))
    slurm.run("scancel", "--batch", "--signal=USR1", job_of(home, run_id, 2))
    event = home.follow(run_id, ended(2))
    last = [e["payload"]["step"] for e in home.events(run_id, "StepCompleted") if e["attempt"] == 2][-1]
    assert (event["type"], event["payload"]["step"]) == ("AttemptPreempted", last)

    # A person cancels the job behind sftd's back, who does not insist: the run is paused.
    home.follow(run_id, in_attempt(3))
    freeze(home, run_id, 3)
    job = job_of(home, run_id, 3)
    slurm.run("scancel", job)
    event = home.follow(run_id, ended(3))
    assert (event["type"], event["payload"]["by"]) == ("AttemptPaused", f"scancel of job {job}")
    home.run("resume", run_id)

    # The controller is gone, then the daemon as well; the next one takes the job up by its number.
    home.follow(run_id, in_attempt(4))
    ranks = freeze(home, run_id, 4)
    slurm.stop_controller()
    log = home.path / "daemon.log"
    until(lambda: "cannot be observed now" in log.read_text())
    daemon.kill()
    daemon.wait(timeout=30)
    daemon = home.start_daemon()
    home.follow(run_id, lambda e: e["type"] == "AttemptAdopted" and e["attempt"] == 4)
    recorded = home.show(run_id)["step"]
    for rank in ranks:
        rank.resume()
    home.follow(run_id, in_attempt(4, recorded + 5))
    ranks = freeze(home, run_id, 4)
    assert home.show(run_id)["attempt"] == 4, "who cannot be observed is not dead"
    slurm.start_controller()

    # The node's slurmd dies, and Slurm takes the node for lost, though the ranks live: they may write no more.
    zombies = home.attempt(run_id, 4)
    slurm.kill_slurmd(NODES[0])
    event = home.follow(run_id, ended(4))
    assert event["type"] == "AttemptLost"
    assert "NODE_FAIL" in event["payload"]["message"]
    before = zombies.journal.read_bytes()
    for rank in ranks:
        assert rank.is_running()
        rank.resume()
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    assert [error.exception.split(":")[0] for error in find_remains(zombies).rank_errors] == ["GivenUp"]
    assert zombies.journal.read_bytes() == before
    slurm.kill_node(NODES[0])
    slurm.start_node(NODES[0])

    # Over their time: one told before, one killed outright.
    alarm.join()
    event = home.follow(told, ended(1))
    assert (event["type"], "told" in event["payload"]["reason"]) == ("AttemptPreempted", True)
    (saved, made) = (
        [e["payload"]["step"] for e in home.events(told, kind) if e["attempt"] == 1][-1]
        for kind in ("CheckpointPublished", "StepCompleted")
    )
    assert event["payload"]["step"] == saved == made
    event = home.follow(killed, ended(1))
    assert event["type"] == "AttemptPreempted"
    assert "time limit" in event["payload"]["reason"]

    undisturbed = home.submit(*settings)
    home.wait(undisturbed, "succeeded")
    expected = timeline(home, undisturbed)
    assert len(expected) == 1500
    for other, attempts in ((run_id, 5), (killed, 2), (told, 2)):
        shown = home.wait(other, "succeeded")
        assert (shown["attempt"], shown["anomalies"]) == (attempts, 0)
        assert timeline(home, other) == expected
        assert_log_holds_journals(home, other)
    daemon.terminate()
    daemon.wait(timeout=30)
