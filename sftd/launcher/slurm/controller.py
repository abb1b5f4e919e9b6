"""Calls to Slurm's controller in separate threads, so that a daemon's tick never waits for it.

One thread polls all jobs in one call every few seconds and cancels jobs. Another submits new jobs. Attempts read the last answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sftd.launcher.slurm import commands as slurm_commands
from sftd.launcher.slurm.commands import Refusal, Run, SlurmJob, Unanswered

log = logging.getLogger("sftd.daemon")

# Minimum time between two polls when attempts request an early one.
_SOON_SECONDS = 1.0
_SUBMIT_AGAIN_SECONDS = 10.0
_CANCEL_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """The controller's jobs at a moment between `begun` and `ended` (seconds of `time.monotonic`). `silent_since` is the time of
    the first failed poll since then (None while it answers), `error` the last error."""

    jobs: Mapping[str, SlurmJob] = field(default_factory=dict)
    begun: float = float("-inf")
    ended: float = float("-inf")
    silent_since: float | None = None
    error: str = ""

    def of_folder(self, folder: str) -> SlurmJob | None:
        """The job with this working folder."""
        return next((job for job in self.jobs.values() if job.folder == folder), None)


@dataclass
class Submission:
    """A job to be submitted. `job` is its number once it is submitted, `refusal` the error if it never will be. `waits_for` is the
    reason of the last failed try, at `tried`. `is_unsure`: that try may have submitted the job."""

    folder: str
    script: str
    env: Mapping[str, str]
    job: str = ""
    refusal: Refusal | None = None
    waits_for: str = ""
    is_unsure: bool = False
    tried: float = 0.0
    is_withdrawn: bool = False
    is_done: bool = False


@dataclass
class Doomed:
    """A job that is cancelled repeatedly until Slurm reports its end: scancel may fail, and a controller may lose a successful
    one. `error` is the error of the last scancel."""

    folder: str
    since: float
    tried: float = float("-inf")
    error: str = ""
    missed: int = 0

    def is_due(self, now: float, answer: Answer) -> bool:
        """Whether to cancel the job now: at first, and again if a later answer still has the job."""
        if self.tried == float("-inf"):
            return True
        if answer.silent_since is not None or answer.begun < self.tried:
            return False
        return bool(self.error) or now - self.tried > _CANCEL_AGAIN_SECONDS

    def is_done(self, job: SlurmJob | None, begun: float) -> bool:
        """Whether there is no job left to cancel. `job` is its entry in an answer that was requested at `begun`."""
        if job is not None:
            self.missed = 0
            # A controller that lost its state gives the number to another job.
            return job.has_ended or job.folder not in ("", self.folder)
        self.missed += begun > self.since
        return self.missed > 1


class Controller:
    """Runs all of the daemon's Slurm commands. Its threads start with the first call."""

    def __init__(self, poll_seconds: float = 10.0, run: Run = slurm_commands.run_command) -> None:
        self._run = run
        self._poll_seconds = poll_seconds
        self._answer = Answer()
        self._watched: set[str] = set()
        self._doomed: dict[str, Doomed] = {}
        self._asked_to_cancel = False
        self._submissions: deque[Submission] = deque()
        self._has_accounting = True
        self._is_stopped = False
        self._asked_soon = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self.calls = 0

    @property
    def answer(self) -> Answer:
        """The last answer."""
        return self._answer

    def watch(self, job: str) -> None:
        """Include this job in the answers, even if only the accounting has it."""
        with self._changed:
            self._watched.add(job)
            self._begin()

    def forget(self, job: str) -> None:
        """Undo `watch`."""
        with self._changed:
            self._watched.discard(job)

    def ask_soon(self) -> None:
        """Request an early poll."""
        with self._changed:
            self._begin()
            if not self._asked_soon:
                self._asked_soon = True
                self._changed.notify_all()

    def submit(self, folder: str, script: str, env: Mapping[str, str]) -> Submission:
        """Queue the submission of the job of an attempt's folder."""
        submission = Submission(folder, script, env)
        with self._changed:
            self._submissions.append(submission)
            self._begin()
            self._changed.notify_all()
        return submission

    def cancel(self, job: str, folder: str) -> None:
        """Cancel the job with this working folder, repeatedly until it has ended. Idempotent."""
        with self._changed:
            if job not in self._doomed:
                self._doomed[job] = Doomed(folder, time.monotonic())
                self._asked_to_cancel = True
                self._begin()
                self._changed.notify_all()

    def is_doomed(self, job: str) -> bool:
        """Whether a job is being cancelled and may still exist."""
        return job in self._doomed

    def why_not_cancelled(self, job: str) -> str:
        """The error of the job's last scancel, else ""."""
        doomed = self._doomed.get(job)
        return doomed.error if doomed is not None else ""

    def stop(self) -> None:
        """End the threads after their current call. Jobs continue."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _begin(self) -> None:
        if self._threads or self._is_stopped:
            return
        for target in (self._keep_asking, self._keep_submitting):
            thread = threading.Thread(target=target, name=f"slurm-{target.__name__.strip('_')}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _call(self, argv: list[str], env: Mapping[str, str] | None, seconds: float) -> tuple[int, str, str]:
        self.calls += 1
        return self._run(argv, env, seconds)

    def _wait(self, until: Callable[[], bool], seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or until(), seconds)

    def _keep_asking(self) -> None:
        while not self._is_stopped:
            self._cancel_all()
            self._asked_soon = False
            self._ask()
            asked = time.monotonic()
            self._wait(lambda: self._asked_soon or self._asked_to_cancel, self._poll_seconds)
            # Limits the rate when many attempts request early polls.
            rest = min(_SOON_SECONDS, self._poll_seconds) - (time.monotonic() - asked)
            if rest > 0:
                self._wait(lambda: False, rest)

    def _cancel_all(self) -> None:
        now = time.monotonic()
        with self._changed:
            self._asked_to_cancel = False
            due = {
                job: doomed
                for job, doomed in sorted(self._doomed.items())
                if doomed.is_due(now, self._answer)
            }
        if not due:
            return
        error = ""
        try:
            slurm_commands.cancel(self._call, list(due))
        except Unanswered as unanswered:
            error = str(unanswered)
            if any(doomed.error != error for doomed in due.values()):
                log.warning("Slurm: scancel of %d jobs: %s; trying until it works", len(due), error)
        for doomed in due.values():
            doomed.tried, doomed.error = time.monotonic(), error

    def _ask(self) -> None:
        begun = time.monotonic()
        before = self._answer
        try:
            jobs = slurm_commands.own_jobs(self._call)
        except (Unanswered, ValueError) as error:
            if before.silent_since is None:
                log.warning("Slurm does not answer (%s): its jobs cannot be observed now", error)
            since = begun if before.silent_since is None else before.silent_since
            self._answer = Answer(before.jobs, before.begun, before.ended, since, str(error))
            return
        if before.silent_since is not None:
            log.info("Slurm answers again")
        with self._changed:
            missing = sorted(self._watched - jobs.keys())
        known = {number: job for number in missing if (job := before.jobs.get(number)) and job.has_ended}
        if missing := [number for number in missing if number not in known]:
            known |= self._account(missing)
        jobs |= known
        self._answer = Answer(jobs, begun, time.monotonic())
        with self._changed:
            # A missing job may be too new for the answer, or gone.
            self._doomed = {
                number: doomed
                for number, doomed in self._doomed.items()
                if not doomed.is_done(jobs.get(number), begun)
            }

    def _account(self, numbers: list[str]) -> dict[str, SlurmJob]:
        """The accounting's records of jobs that the controller no longer lists. Many clusters have no accounting."""
        if not self._has_accounting:
            return {}
        try:
            return slurm_commands.accounted(self._call, numbers)
        except Unanswered as error:
            if "disabled" in str(error):
                self._has_accounting = False
            else:
                log.warning("Slurm's accounting: %s", error)
        except ValueError as error:
            log.warning("Slurm's accounting cannot be read: %s", error)
        return {}

    def _keep_submitting(self) -> None:
        while not self._is_stopped:
            self._wait(lambda: bool(self._submissions), None)
            with self._changed:
                submission = self._submissions.popleft() if self._submissions else None
            if submission is None:
                continue
            if self._hand_over(submission):
                submission.is_done = True
                self.ask_soon()
                continue
            # After the others, so that one job over a limit does not delay them.
            with self._changed:
                self._submissions.append(submission)
                alone = len(self._submissions) == 1 or bool(self._answer.silent_since)
            self._wait(lambda: False, _SUBMIT_AGAIN_SECONDS if alone else _SOON_SECONDS)

    def _hand_over(self, submission: Submission) -> bool:
        """Try to submit. Returns whether the submission is done: submitted, refused or withdrawn."""
        if submission.is_unsure:
            # The previous sbatch may have submitted the job without getting the answer.
            if self._answer.begun <= submission.tried:
                return False
            if found := self._answer.of_folder(submission.folder):
                submission.job = found.job
                return True
            submission.is_unsure = False
        if submission.is_withdrawn:
            return True
        try:
            submission.job = slurm_commands.submit(self._call, submission.script, submission.env)
        except Refusal as refusal:
            if refusal.later:
                submission.waits_for = str(refusal)
                submission.is_unsure = refusal.unsure
                submission.tried = time.monotonic()
                self.ask_soon()
                return False
            submission.refusal = refusal
        return True
