"""The launcher's dealings with Slurm's controller, which is a function here: what it says, what it withholds, and when."""

from __future__ import annotations

import errno
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sftd.domain.run.failures import classify
from sftd.domain.spec.parse import parse
from sftd.launcher.choosing import ByName
from sftd.launcher.inventory import Need
from sftd.launcher.local import LocalAttempt
from sftd.launcher.slurm import commands as slurm_commands
from sftd.launcher.slurm.attempt import SlurmAttempt, SlurmLauncher, job_environment
from sftd.launcher.slurm.commands import Refusal, SlurmJob, Unanswered
from sftd.launcher.slurm.controller import Answer, Controller, Doomed
from sftd.wire.attempt.directory import AttemptDir, Order
from tests.builders.patience import until

DOWN = (1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")


class Slurm:
    """A cluster: `jobs` is number → (state, restarts, reason, folder)."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, int, str, str]] = {}
        self.answers: dict[str, Any] = {}
        self.asked: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def run(self, argv: list[str], env: Mapping[str, str] | None, seconds: float) -> tuple[int, str, str]:
        self.asked.append(argv)
        self.go.wait()
        answer = self.answers.get(argv[0])
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        if argv[0] == "squeue":
            lines = [f"{n}|{s}|{r}|n1|0|{why}|{at}|\n" for n, (s, r, why, at) in self.jobs.items()]
            return 0, "".join(lines), ""
        if argv[0] == "sbatch":
            number = str(len(self.jobs) + 1)
            self.jobs[number] = ("PENDING", 0, "Priority", str(Path(argv[-1]).parent))
            return 0, number + "\n", ""
        if argv[0] == "scancel":
            for number in argv[2:]:
                self.jobs[number] = ("CANCELLED", *self.jobs[number][1:])
            return 0, "", ""
        return 1, "", "Slurm accounting storage is disabled"

    def becomes(self, number: str, state: str, restarts: int = 0, reason: str = "None") -> None:
        self.jobs[number] = (state, restarts, reason, self.jobs[number][3])

    def count(self, command: str) -> int:
        return sum(argv[0] == command for argv in self.asked)


@pytest.fixture
def slurm() -> Slurm:
    return Slurm()


@pytest.fixture
def controller(slurm: Slurm) -> Iterator[Controller]:
    made = Controller(0.01, slurm.run)
    yield made
    made.stop()
    slurm.go.set()


@pytest.fixture
def start(controller: Controller, tmp_path: Path) -> Callable[..., SlurmAttempt]:
    def begin(run_id: str = "run") -> SlurmAttempt:
        config = {"model": {"path": "/m"}, "data": {"train_files": "/t"}, "launch": {"launcher": "slurm"}}
        order = Order(
            run_id=run_id,
            attempt=1,
            token="t",
            spec=parse(config)[0],
            planned_steps=1,
            checkpoint_dir="/c",
        )
        attempt, _ = SlurmLauncher(controller).start(
            AttemptDir(tmp_path / run_id), order, Need("slurm", 1, 1), ["slurm:0"]
        )
        assert isinstance(attempt, SlurmAttempt)
        return attempt

    return begin


def reports(attempt: SlurmAttempt, state: str) -> bool:
    assert attempt.is_alive()
    report = attempt.report()
    return report is not None and report.state == state


def said(attempt: SlurmAttempt) -> str:
    report = attempt.report()
    assert report is not None
    return report.reason


def waits(attempt: SlurmAttempt) -> bool:
    report = attempt.report()
    assert report is not None
    return report.waits


def submitted(attempt: SlurmAttempt) -> SlurmAttempt:
    until(lambda: attempt.is_alive() and attempt.process and attempt.process.job)
    return attempt


def test_a_job_is_followed_from_its_queue_to_its_end(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    attempt = start()
    until(lambda: reports(attempt, "PENDING"))
    report = attempt.report()
    assert report is not None
    assert (report.job, report.reason, report.waits, report.trains) == ("1", "Priority", True, False)
    slurm.becomes("1", "RUNNING")
    until(lambda: reports(attempt, "RUNNING"))
    slurm.becomes("1", "COMPLETING")
    until(lambda: reports(attempt, "COMPLETING"))
    slurm.becomes("1", "TIMEOUT")
    until(lambda: not attempt.is_alive())
    remains = attempt.remains()
    assert remains.interruption is not None
    assert remains.interruption.kind == "time limit"
    assert "TIMEOUT" in remains.last_word


def test_nobody_waits_for_a_controller_that_hangs(slurm: Slurm, start: Callable[..., SlurmAttempt]) -> None:
    slurm.go.clear()
    began = time.monotonic()
    attempt = start()
    assert attempt.is_alive()
    report = attempt.report()
    assert report is not None
    assert report.state == "NOT SUBMITTED"
    assert attempt.kill() == [0]
    assert attempt.remains().exit_code is None
    assert time.monotonic() - began < 30, "half of what a command of Slurm's may take"
    slurm.go.set()
    # What was under way then is cancelled as soon as it has a number.
    until(lambda: not attempt.kill())
    assert not attempt.is_alive()


def test_who_does_not_answer_is_not_observed_and_not_dead(
    slurm: Slurm, start: Callable[..., SlurmAttempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftd.launcher.slurm.attempt._SILENT_SECONDS", 0.0)
    attempt = submitted(start())
    slurm.becomes("1", "RUNNING")
    until(lambda: reports(attempt, "RUNNING"))
    slurm.answers["squeue"] = DOWN
    until(lambda: reports(attempt, "NOT OBSERVED"))
    report = attempt.report()
    assert report is not None
    assert "Unable to contact" in report.reason
    assert not report.trains, "nobody may take its silence for a hang"
    asked = slurm.count("squeue")
    until(lambda: slurm.count("squeue") > asked + 3)
    assert attempt.is_alive()
    del slurm.answers["squeue"]
    until(lambda: reports(attempt, "RUNNING"))


def test_an_exit_code_is_proof_where_slurm_is_silent(
    slurm: Slurm, start: Callable[..., SlurmAttempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = submitted(start())
    slurm.answers["squeue"] = DOWN
    attempt.directory.write_exit_code(0)
    assert attempt.is_alive(), "Slurm has a while to say what it thinks of it"
    monkeypatch.setattr("sftd.launcher.slurm.attempt._CLEARING_SECONDS", 0.0)
    until(lambda: not attempt.is_alive())


@pytest.mark.parametrize(
    ("state", "cause"), [("NODE_FAIL", "lost"), ("OUT_OF_MEMORY", "out of memory"), ("FAILED", "killed")]
)
def test_sruns_zero_is_not_believed_against_slurms_word(
    slurm: Slurm, start: Callable[..., SlurmAttempt], state: str, cause: str
) -> None:
    attempt = submitted(start())
    attempt.directory.write_exit_code(0)
    slurm.becomes("1", state)
    until(lambda: not attempt.is_alive())
    remains = attempt.remains()
    assert (remains.exit_code, state in remains.last_word) == (None, True)
    assert classify(remains).cause == cause


def test_a_job_that_began_while_the_controller_was_away_is_queued_again(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    """As srun of Slurm 22.05 says it, which starts nothing then. What has begun to train fails by itself."""
    attempt = submitted(start())
    attempt.directory.output_log.write_text(
        "srun: error: Unable to confirm allocation for job 8: Unable to contact slurm controller (connect failure)\n"
        "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 8.\n"
    )
    attempt.directory.write_exit_code(1)
    slurm.becomes("1", "FAILED")
    until(lambda: not attempt.is_alive())
    interruption = attempt.remains().interruption
    assert interruption is not None
    assert (interruption.kind, "controller was down" in interruption.message) == ("requeued", True)
    attempt.directory.journal.touch()
    assert attempt.remains().interruption is None


def test_nothing_hides_the_daemons_own_jobs_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue leaves out what is in hidden partitions, and all that a person's SQUEUE_… variables leave out."""
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_CONF", "/c")
    asked: list[tuple[list[str], Any]] = []

    def run(argv: list[str], env: Any, seconds: float) -> tuple[int, str, str]:
        asked.append((argv, env))
        return 0, "", ""

    slurm_commands.own_jobs(run)
    ((argv, env),) = asked
    assert "--all" in argv
    assert (env.get("SQUEUE_PARTITION"), env["SLURM_CONF"]) == (None, "/c")


def test_a_job_that_was_seen_again_was_not_forgotten(
    slurm: Slurm, start: Callable[..., SlurmAttempt], controller: Controller
) -> None:
    """As when a controller is restarted, now and again in a long life, and does not know all at once."""
    attempt = submitted(start())
    until(lambda: reports(attempt, "PENDING"))
    jobs = controller.answer.jobs
    controller.stop()
    for begun in (1, 2, 3):
        now = time.monotonic() + begun
        controller._answer = Answer({}, now, now)
        assert attempt.is_alive()
        controller._answer = Answer(jobs, now, now)
        assert attempt.is_alive()


def test_a_job_that_has_its_number_now_is_not_cancelled(
    slurm: Slurm, start: Callable[..., SlurmAttempt], controller: Controller
) -> None:
    attempt = submitted(start())
    until(lambda: reports(attempt, "PENDING"))
    slurm.jobs["1"] = ("RUNNING", 0, "None", "/elsewhere")
    until(lambda: controller.answer.jobs["1"].folder == "/elsewhere")
    until(lambda: not attempt.kill())
    assert (slurm.jobs["1"][0], slurm.count("scancel")) == ("RUNNING", 0)


def test_a_job_that_slurm_has_forgotten_is_gone(slurm: Slurm, start: Callable[..., SlurmAttempt]) -> None:
    attempt = submitted(start())
    del slurm.jobs["1"]
    until(lambda: not attempt.is_alive())
    assert slurm.count("sacct") == 1, "who has no accounting is not asked again"


def test_the_accounting_knows_more(slurm: Slurm, start: Callable[..., SlurmAttempt]) -> None:
    attempt = submitted(start())
    slurm.answers["sacct"] = (0, "1|NODE_FAIL|n1|0:0\n", "")
    del slurm.jobs["1"]
    until(lambda: not attempt.is_alive())
    assert "NODE_FAIL" in attempt.remains().last_word


def test_a_job_of_another_attempt_by_the_same_number_is_not_taken_for_it(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    """As when a controller has lost its state, and counts from 1 again."""
    attempt = submitted(start())
    slurm.jobs["1"] = ("RUNNING", 0, "None", "/elsewhere")
    until(lambda: not attempt.is_alive())


def test_a_requeued_job_is_cancelled_and_its_attempt_over(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    attempt = submitted(start())
    slurm.becomes("1", "COMPLETING", restarts=1)
    until(lambda: reports(attempt, "COMPLETING"))
    slurm.becomes("1", "PENDING", restarts=1)
    until(lambda: not attempt.is_alive())
    until(lambda: slurm.jobs["1"][0] == "CANCELLED")
    interruption = attempt.remains().interruption
    assert interruption is not None
    assert interruption.kind == "requeued"


def test_a_job_that_no_node_can_start_is_lost_and_not_queued_again_at_once(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    """Slurm holds it, for its next node would be drained as well."""
    attempt = submitted(start())
    slurm.becomes("1", "REQUEUE_HOLD", restarts=1, reason="launch_failed_requeued_held")
    until(lambda: not attempt.is_alive())
    remains = attempt.remains()
    assert remains.interruption is None
    assert "launch_failed" in remains.last_word


def test_a_kill_is_one_scancel_for_all_and_bars_what_comes_late(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    attempts = [submitted(start(f"run{n}")) for n in range(5)]
    slurm.go.clear()
    for attempt in attempts:
        assert attempt.kill()
        assert attempt.kill()
        assert attempt.directory.is_fenced()
    slurm.go.set()
    until(lambda: not any(attempt.kill() for attempt in attempts))
    assert slurm.count("scancel") <= 2


@pytest.mark.parametrize(
    "failure",
    [
        (1, "", "scancel: error: Kill job error on job id 1: Unable to contact slurm controller"),
        subprocess.TimeoutExpired("scancel", 60),
        OSError(errno.EAGAIN, "Resource temporarily unavailable"),
    ],
    ids=["away", "hangs", "cannot start"],
)
def test_a_scancel_that_failed_is_tried_until_it_works(
    slurm: Slurm, start: Callable[..., SlurmAttempt], failure: Any
) -> None:
    """Though nobody asks again; and until then the reason is shown."""
    attempt = submitted(start())
    until(lambda: reports(attempt, "PENDING"))
    slurm.answers["scancel"] = failure
    assert attempt.kill() == [1]
    until(lambda: slurm.count("scancel") > 2)
    until(lambda: "not cancelled yet" in said(attempt))
    assert said(attempt).startswith("Priority; not cancelled yet: ")
    assert any(word in said(attempt) for word in ("Unable to contact", "got no answer", "unavailable"))
    assert attempt.is_alive()
    del slurm.answers["scancel"]
    until(lambda: slurm.jobs["1"][0] == "CANCELLED")
    until(lambda: not attempt.is_alive())
    count = slurm.count("scancel")
    asked = slurm.count("squeue")
    until(lambda: slurm.count("squeue") > asked + 3)
    assert slurm.count("scancel") == count, "what has ended is not cancelled again"


def test_a_job_is_cancelled_though_nobody_wants_to_know_of_it_any_more(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    """As one that Slurm has put back into its queue while its scancel fails: the attempt is over at once."""
    attempt = submitted(start())
    slurm.answers["scancel"] = DOWN
    slurm.becomes("1", "PENDING", restarts=1)
    until(lambda: not attempt.is_alive())
    until(lambda: slurm.count("scancel") > 1)
    del slurm.answers["scancel"]
    until(lambda: slurm.jobs["1"][0] == "CANCELLED")


def test_a_job_that_has_its_number_by_now_is_not_cancelled_either(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    attempt = submitted(start())
    until(lambda: reports(attempt, "PENDING"))
    slurm.answers["scancel"] = DOWN
    assert attempt.kill() == [1]
    until(lambda: slurm.count("scancel") > 1)
    slurm.answers["squeue"] = DOWN
    asked = slurm.count("squeue")
    until(lambda: slurm.count("squeue") > asked + 1)
    slurm.jobs["1"] = ("RUNNING", 0, "None", "/elsewhere")
    # The controller is back, and nobody knows yet with which jobs.
    del slurm.answers["scancel"]
    asked = slurm.count("squeue")
    until(lambda: slurm.count("squeue") > asked + 1)
    del slurm.answers["squeue"]
    until(lambda: not attempt.is_alive())
    asked = slurm.count("squeue")
    until(lambda: slurm.count("squeue") > asked + 3)
    assert slurm.jobs["1"][0] == "RUNNING"


def test_an_answer_that_does_not_know_the_job_yet_does_not_save_it(slurm: Slurm) -> None:
    doomed = Doomed("/folder", since=10.0)
    pending = SlurmJob("1", "PENDING", folder="/folder")
    assert not doomed.is_done(None, begun=9.0)
    assert not doomed.is_done(None, begun=9.0)
    assert not doomed.is_done(None, begun=11.0)
    assert not doomed.is_done(pending, begun=12.0)
    assert not doomed.is_done(None, begun=13.0)
    assert doomed.is_done(None, begun=14.0)


def test_who_started_while_slurm_was_silent_waits_no_more(
    slurm: Slurm, start: Callable[..., SlurmAttempt], controller: Controller
) -> None:
    """A stop would cancel one that waits, and with it what it has trained since its last checkpoint."""
    attempt = submitted(start())
    until(lambda: reports(attempt, "PENDING"))
    slurm.answers["squeue"] = DOWN
    until(lambda: controller.answer.silent_since is not None)
    assert waits(attempt)
    attempt.directory.started_dir.mkdir()
    assert not waits(attempt)


def test_few_calls_whatever_the_number_of_jobs(slurm: Slurm, start: Callable[..., SlurmAttempt]) -> None:
    attempts = [submitted(start(f"run{n}")) for n in range(30)]
    asked = len(slurm.asked)
    for _ in range(100):
        for attempt in attempts:
            attempt.is_alive()
            attempt.report()
    assert all(argv[0] == "squeue" for argv in slurm.asked[asked:])
    assert not any("-j" in argv or "--jobs" in argv for argv in slurm.asked)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("invalid partition specified: nowhere", "never"),
        ("Invalid account or account/partition combination specified", "never"),
        ("Invalid qos specification", "never"),
        ("Requested node configuration is not available", "never"),
        ("sbatch: unrecognized option '--men=0'", "never"),
        ("Invalid generic resource (gres) specification", "never"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "never"),
        ("Required partition not available (inactive or drain)", "later"),
        ("Unable to contact slurm controller (connect failure)", "later"),
        ("Socket timed out on send/recv operation", "unsure"),
        ("QOSMaxSubmitJobPerUserLimit", "later"),
        ("Slurm temporarily unable to accept job, sleeping and retrying", "later"),
        ("Something that nobody has seen", "crash"),
    ],
)
def test_why_a_job_is_not_taken(message: str, kind: str) -> None:
    def run(*_: Any) -> tuple[int, str, str]:
        return 1, "", f"sbatch: error: Batch job submission failed: {message}\n"

    with pytest.raises(Refusal) as refused:
        slurm_commands.submit(run, "/job.sh", {})
    found = refused.value
    assert (found.never, found.later, found.unsure) == {
        "never": (True, False, False),
        "later": (False, True, False),
        "unsure": (False, True, True),
        "crash": (False, False, False),
    }[kind]


def test_a_refused_job_is_told_in_the_attempts_output(
    slurm: Slurm, start: Callable[..., SlurmAttempt]
) -> None:
    slurm.answers["sbatch"] = (1, "", "sbatch: error: invalid partition specified: nowhere")
    attempt = start()
    until(lambda: not attempt.is_alive())
    assert attempt.kill() == []
    assert attempt.remains().interruption is None
    assert attempt.remains().output_tail == [
        "Refused: sbatch did not take the job: invalid partition specified: nowhere"
    ]


def test_a_job_that_is_over_a_limit_waits_and_says_so(
    slurm: Slurm, start: Callable[..., SlurmAttempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftd.launcher.slurm.controller._SUBMIT_AGAIN_SECONDS", 0.01)
    slurm.answers["sbatch"] = (1, "", "sbatch: error: QOSMaxSubmitJobPerUserLimit")
    attempt = start()
    until(lambda: attempt.is_alive() and (attempt.report() or attempt).reason)  # type: ignore[union-attr]
    assert reports(attempt, "NOT SUBMITTED")
    del slurm.answers["sbatch"]
    until(lambda: reports(attempt, "PENDING"))


def test_an_sbatch_that_could_not_say_what_it_did_is_not_repeated(
    slurm: Slurm, start: Callable[..., SlurmAttempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftd.launcher.slurm.controller._SUBMIT_AGAIN_SECONDS", 0.01)
    run = slurm.run

    def submitted_but_silent(argv: list[str], *rest: Any) -> tuple[int, str, str]:
        answer = run(argv, *rest)
        return (
            (1, "", "sbatch: error: Socket timed out on send/recv operation")
            if argv[0] == "sbatch"
            else answer
        )

    slurm_run = Controller(0.01, submitted_but_silent)
    directory = AttemptDir(Path("/folder"))
    submission = slurm_run.submit(str(directory.path), str(directory.script_file), {})
    until(lambda: submission.is_done)
    slurm_run.stop()
    assert (submission.job, len(slurm.jobs)) == ("1", 1)


def test_a_daemon_that_died_at_its_sbatch_leaves_a_job_that_is_found(
    slurm: Slurm, start: Callable[..., SlurmAttempt], controller: Controller
) -> None:
    first = start()
    until(lambda: slurm.jobs)
    # As the first daemon wrote it, before it knew the number.
    assert first.process is not None
    first.directory.write_process(first.process)
    again = SlurmLauncher(controller).adopt(first.directory, "unused")
    until(lambda: again.is_alive() and again.process and again.process.job == "1")
    found = first.directory.process()
    assert found is not None
    assert found.job == "1"


def test_a_job_that_the_daemon_before_cancelled_was_not_cancelled_by_a_person(
    slurm: Slurm, controller: Controller, start: Callable[..., SlurmAttempt]
) -> None:
    """As one that hung: it is tried again, and does not wait for somebody to resume it."""
    first = submitted(start())
    by_a_person = SlurmLauncher(controller).adopt(first.directory, "unused")
    assert first.kill()
    again = SlurmLauncher(controller).adopt(first.directory, "unused")
    until(lambda: not again.is_alive() and not by_a_person.is_alive())
    assert again.remains().interruption is None
    interruption = by_a_person.remains().interruption
    assert interruption is not None
    assert interruption.kind == "cancelled"


def test_a_job_that_never_came_to_be_is_dead_once_slurm_was_asked(
    slurm: Slurm, controller: Controller, start: Callable[..., SlurmAttempt]
) -> None:
    slurm.go.clear()
    first = start()
    again = SlurmLauncher(controller).adopt(first.directory, "unused")
    assert again.is_alive()
    slurm.answers["sbatch"] = (1, "", "sbatch: error: invalid partition specified: x")
    slurm.go.set()
    until(lambda: not again.is_alive())
    assert again.kill() == []
    assert again.directory.is_fenced(), "should it come all the same, it does not start"
    interruption = again.remains().interruption
    assert interruption is not None, "no fault of the run's, which a limit of failures would end"
    assert "never submitted to Slurm" in interruption.message


def test_an_order_that_cannot_be_read_now_does_not_make_a_job_a_process_of_this_host(
    controller: Controller, start: Callable[..., SlurmAttempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be found dead at once, and the run would train twice."""
    first = submitted(start())
    launcher = ByName({"local": LocalAttempt, "slurm": SlurmLauncher(controller)})

    def stale(_: AttemptDir) -> Order:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(AttemptDir, "order", stale)
        with pytest.raises(OSError, match="Stale"):
            launcher.adopt(first.directory, "unused")
    first.directory.order_file.write_text("{")
    assert isinstance(launcher.adopt(first.directory, "unused"), SlurmAttempt)
    assert isinstance(launcher.adopt(AttemptDir(first.directory.path / "none"), "unused"), LocalAttempt)


def test_the_job_inherits_neither_secrets_nor_another_jobs_variables() -> None:
    found = job_environment(
        {
            "PATH": "/bin",
            "PGPASSWORD": "hush",
            "SLURM_JOB_ID": "3",
            "SBATCH_REQUEUE": "1",
            "SLURM_CONF": "/c",
            "CUDA_VISIBLE_DEVICES": "0",
        }
    )
    assert found == {"PATH": "/bin", "SLURM_CONF": "/c"}


def test_a_controller_that_answers_nonsense_was_not_asked() -> None:
    def run(*_: Any) -> tuple[int, str, str]:
        return 0, "what?\n", ""

    with pytest.raises((Unanswered, ValueError)):
        slurm_commands.own_jobs(run)
