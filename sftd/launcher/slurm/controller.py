"""Slurm's controller, asked by threads of its own: a daemon's tick never waits for it.

One thread asks about all jobs in one call every few seconds and cancels, another hands new jobs over. Whoever wants to
know reads the last answer.
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

# Whoever waits for an answer gets it sooner, but not all at once.
_SOON_SECONDS = 1.0
_SUBMIT_AGAIN_SECONDS = 10.0
_CANCEL_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """What the controller said: its jobs as of a moment between `begun` and `ended` (seconds of `time.monotonic`).
    `silent_since` is when it ceased to answer, and `error` how; None while it answers."""

    jobs: Mapping[str, SlurmJob] = field(default_factory=dict)
    begun: float = float("-inf")
    ended: float = float("-inf")
    silent_since: float | None = None
    error: str = ""

    def of_folder(self, folder: str) -> SlurmJob | None:
        """The job that runs in this folder."""
        return next((job for job in self.jobs.values() if job.folder == folder), None)


@dataclass
class Submission:
    """A job on its way to Slurm. `job` is its number once it is there; `refusal` says that it will never be. `waits_for` is
    why it is not there yet, as of `tried`; `is_unsure`: it may be all the same."""

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
    """A job that shall end, and is cancelled until Slurm says that it has: a scancel may fail, and one that worked may be
    lost with a controller. `error` is why the last one failed."""

    folder: str
    since: float
    tried: float = float("-inf")
    error: str = ""
    missed: int = 0

    def is_due(self, now: float, answer: Answer) -> bool:
        """Whether it is to be cancelled now: at once, and again when Slurm, asked since, still has the job."""
        if self.tried == float("-inf"):
            return True
        if answer.silent_since is not None or answer.begun < self.tried:
            return False
        return bool(self.error) or now - self.tried > _CANCEL_AGAIN_SECONDS

    def is_done(self, job: SlurmJob | None, begun: float) -> bool:
        """Whether no job is left to cancel, by what an answer that was asked for at `begun` says of it."""
        if job is not None:
            self.missed = 0
            # A controller that has lost its state gives the number to others.
            return job.has_ended or job.folder not in ("", self.folder)
        self.missed += begun > self.since
        return self.missed > 1


class Controller:
    """The only one who runs Slurm's commands. Its threads begin with the first question."""

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
        """Somebody wants to know of this job from now on, even when the controller has forgotten it."""
        with self._changed:
            self._watched.add(job)
            self._begin()

    def forget(self, job: str) -> None:
        """Nobody wants to know of this job any more."""
        with self._changed:
            self._watched.discard(job)

    def ask_soon(self) -> None:
        """Somebody waits for an answer."""
        with self._changed:
            self._begin()
            if not self._asked_soon:
                self._asked_soon = True
                self._changed.notify_all()

    def submit(self, folder: str, script: str, env: Mapping[str, str]) -> Submission:
        """Hand the job of an attempt's folder over, in its turn."""
        submission = Submission(folder, script, env)
        with self._changed:
            self._submissions.append(submission)
            self._begin()
            self._changed.notify_all()
        return submission

    def cancel(self, job: str, folder: str) -> None:
        """End the job that runs in this folder: it is asked for until it has ended. Asking again changes nothing."""
        with self._changed:
            if job not in self._doomed:
                self._doomed[job] = Doomed(folder, time.monotonic())
                self._asked_to_cancel = True
                self._begin()
                self._changed.notify_all()

    def is_doomed(self, job: str) -> bool:
        """Whether a job is to be cancelled, and not known to have ended."""
        return job in self._doomed

    def why_not_cancelled(self, job: str) -> str:
        """Why a job that is to be cancelled is not yet, when the last scancel failed."""
        doomed = self._doomed.get(job)
        return doomed.error if doomed is not None else ""

    def stop(self) -> None:
        """End the threads when what they do now is done. Jobs go on."""
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
            # Many may ask soon one after another.
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
            # Missing in the answer may be a job that the controller does not know yet, or none any more.
            self._doomed = {
                number: doomed
                for number, doomed in self._doomed.items()
                if not doomed.is_done(jobs.get(number), begun)
            }

    def _account(self, numbers: list[str]) -> dict[str, SlurmJob]:
        """What the accounting knows of jobs that the controller has forgotten; many clusters have none."""
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
            # Behind the others, so that one job over a limit does not keep them back.
            with self._changed:
                self._submissions.append(submission)
                alone = len(self._submissions) == 1 or bool(self._answer.silent_since)
            self._wait(lambda: False, _SUBMIT_AGAIN_SECONDS if alone else _SOON_SECONDS)

    def _hand_over(self, submission: Submission) -> bool:
        """Whether the submission has come to an end, one way or another."""
        if submission.is_unsure:
            # An sbatch before may have done it, though it could not say so.
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
