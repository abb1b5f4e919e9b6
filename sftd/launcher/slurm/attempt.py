"""Attempts that Slurm runs. Each is a job with a number, and Slurm's report on that job proves its end."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping

import msgspec

from sftd.domain.run.failures import Cause, Interruption, Remains
from sftd.launcher.command import without_secrets
from sftd.launcher.inventory import Need
from sftd.launcher.processes import host_name
from sftd.launcher.seam import Attempt, Report
from sftd.launcher.slurm import script as slurm_script
from sftd.launcher.slurm.commands import ENDED, WAITING, SlurmJob
from sftd.launcher.slurm.controller import Answer, Controller, Submission
from sftd.settings import Settings
from sftd.wire.attempt.directory import AttemptDir, Order, ProcessFile, write_atomic
from sftd.wire.attempt.remains import find_remains, find_stack

# Slurm or the job's script sets these, or they change the devices of CPU ranks.
_NOT_INHERITED = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
# Variables of another job, and variables that override the script's options (SBATCH_REQUEUE, SBATCH_ARRAY_INX, …).
_NOT_FOR_A_JOB = ("SLURM_", "SBATCH_")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
# A restart of the controller causes a shorter silence, which is not reported.
_SILENT_SECONDS = 60.0
# After its ranks, a job ends at once in Slurm, unless a machine or the controller hangs.
_CLEARING_SECONDS = 60.0
# srun's message while the controller is down.
_AWAY = "Unable to contact slurm controller"
# The states of an ended job that name a cause.
_CAUSES: dict[str, Cause] = {"NODE_FAIL": "lost", "OUT_OF_MEMORY": "out of memory"}
# Long enough for a shared file system to show new files.
_STACKS_SECONDS = 20.0


def job_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The job's environment: `base` without secrets and without variables of another job."""
    return {
        name: value
        for name, value in without_secrets(base).items()
        if name not in _NOT_INHERITED and (name in _KEPT or not name.startswith(_NOT_FOR_A_JOB))
    }


class SlurmAttempt:
    """One attempt and its job, submitted by this daemon or by an earlier one."""

    stacks_seconds = _STACKS_SECONDS

    def __init__(
        self,
        directory: AttemptDir,
        controller: Controller,
        process: ProcessFile | None,
        submission: Submission | None = None,
    ) -> None:
        self.directory = directory
        self.process = process
        self._controller = controller
        self._submission = submission
        self._refusal = ""
        self._known_since = time.monotonic()
        self._exit_seen: float | None = None
        self._missed: set[float] = set()
        self._was_given_up = directory.is_fenced()
        self._last: SlurmJob | None = None
        self._has_ended = process is None
        if process is not None and process.job:
            controller.watch(process.job)
        elif process is not None:
            controller.ask_soon()

    def is_alive(self) -> bool:
        """Whether the job waits or runs. False only with proof: Slurm reports its end, or torchrun left an exit code, or the job
        was never created."""
        if not self._has_ended and self._is_over():
            self._has_ended = True
            if self.process is not None and self.process.job:
                self._controller.forget(self.process.job)
        return not self._has_ended

    def _is_over(self) -> bool:
        if self._submission is not None and not self._was_submitted(self._submission):
            return self._submission is None
        assert self.process is not None
        answer = self._controller.answer
        if not self.process.job and not self._was_found(answer):
            # Slurm has no such job, in an answer from after the end of the daemon that may have submitted it.
            return answer.begun > self._known_since
        job = answer.jobs.get(self.process.job)
        if job is not None and self._is_others(job):
            job = None
        if job is None and self._has_exit_code(answer):
            return True
        if job is None:
            return self._is_forgotten(answer)
        self._missed.clear()
        self._last = job
        if job.has_ended:
            return True
        if job.restarts and job.state in WAITING:
            # Slurm requeued the job. The previous start is gone, and the script refuses a second one.
            self._controller.cancel(job.job, str(self.directory.path))
            return True
        return self._has_exit_code(answer)

    def _was_submitted(self, submission: Submission) -> bool:
        """Whether the job has a number now. Sets `_submission` to None if it will never have one."""
        if not submission.is_done:
            return False
        if submission.job:
            self._know(submission.job)
            self._submission = None
            return True
        if submission.refusal is not None:
            self._refusal = str(submission.refusal)
            self._write_refusal(submission.refusal.never, self._refusal)
        self._submission = None
        return False

    def _write_refusal(self, never: bool, message: str) -> None:
        """Write the reason why there is no job to the attempt's output."""
        kind = "Refused" if never else "Error"
        with open(self.directory.output_log, "a") as file:
            file.write(f"{kind}: sbatch did not take the job: {message}\n")

    def _know(self, job: str) -> None:
        assert self.process is not None
        self.process = msgspec.structs.replace(self.process, job=job)
        self.directory.write_process(self.process)
        self._known_since = time.monotonic()
        self._controller.watch(job)

    def _was_found(self, answer: Answer) -> bool:
        found = answer.of_folder(str(self.directory.path))
        number = found.job if found else self.directory.started_job()
        if number:
            self._know(number)
        return bool(number)

    def _is_others(self, job: SlurmJob) -> bool:
        """Whether the job is another one with the same number: a controller that lost its state counts from 1 again."""
        return job.folder not in ("", str(self.directory.path))

    def _is_forgotten(self, answer: Answer) -> bool:
        """Whether the job is missing from two answers in a row. Slurm lists an ended job only for some minutes."""
        if answer.silent_since is None and answer.begun > self._known_since:
            self._missed.add(answer.begun)
            self._controller.ask_soon()
        return len(self._missed) > 1

    def _has_exit_code(self, answer: Answer) -> bool:
        """Whether torchrun has ended on every machine, long enough ago for Slurm to report the job's final state."""
        if self.directory.exit_code() is None:
            return False
        now = time.monotonic()
        if self._exit_seen is None:
            self._exit_seen = now
            self._controller.ask_soon()
        elif answer.begun < self._exit_seen:
            self._controller.ask_soon()
        return now - self._exit_seen > _CLEARING_SECONDS

    def kill(self) -> list[int]:
        """Cancel the job, and fence the attempt, so that no process of it starts or continues. Returns the job's number until
        the job has ended."""
        if self.directory.path.is_dir():
            self.directory.fence()
        if not self.is_alive():
            return []
        if self._submission is not None:
            self._submission.is_withdrawn = True
            return [0]
        assert self.process is not None
        known = self._controller.answer.jobs.get(self.process.job)
        if self.process.job and not (known and self._is_others(known)):
            self._controller.cancel(self.process.job, str(self.directory.path))
        self._controller.ask_soon()
        return [int(self.process.job or 0)]

    def report(self) -> Report | None:
        """Slurm's report on the job."""
        if self.process is None:
            return None
        if self._submission is not None or not self.process.job:
            waits_for = self._submission.waits_for if self._submission is not None else self._refusal
            return Report("", "NOT SUBMITTED", waits_for, waits=True)
        answer = self._controller.answer
        job = self._last or SlurmJob(self.process.job, "")
        # A job that started while Slurm was silent has created `started_dir`.
        waits = job.state in WAITING and not job.restarts
        waits = waits and not (answer.silent_since is not None and self.directory.started_dir.exists())
        reason = job.reason if job.state not in ("RUNNING", "COMPLETING") else ""
        if error := self._controller.why_not_cancelled(job.job):
            reason = f"{reason}; not cancelled yet: {error}".removeprefix("; ")
        silent = time.monotonic() - answer.silent_since if answer.silent_since is not None else 0.0
        if silent > _SILENT_SECONDS and not self._has_ended:
            reason = f"Slurm does not answer: {answer.error}"
            if self._controller.is_doomed(job.job):
                reason += "; the job is cancelled when it does"
            return Report(job.job, "NOT OBSERVED", reason, job.nodes, waits=waits)
        return Report(
            job.job,
            job.state,
            reason,
            job.nodes,
            trains=job.state == "RUNNING" and answer.silent_since is None,
            waits=waits,
        )

    def ask_for_stacks(self) -> None:
        """Make every rank write its stack, for `stacks` to read."""
        self.directory.ask_for_stacks()

    def stacks(self) -> list[str]:
        """One line per rank: its stack, innermost frame first, or why there is none."""
        try:
            world = self.directory.order().spec.world_size
        except (OSError, ValueError):
            return []
        if not self.directory.stacks_dir.exists():
            return []
        return [
            f"rank {rank}: {find_stack(self.directory, rank) or 'gives no stack'}" for rank in range(world)
        ]

    def remains(self) -> Remains:
        """What the ended attempt left as evidence of the cause, and Slurm's report."""
        remains = find_remains(self.directory)
        job, signal = self._last, self.directory.told()
        word = _last_word(job)
        # When Slurm ends the job, srun may exit with 0 although torchrun failed.
        code = None if word and remains.exit_code == 0 else remains.exit_code
        interruption = _interruption(job, signal, code)
        if self.process is not None and not self.process.job and not self._refusal:
            # The daemon was stopped before the job was submitted: no fault of the run.
            interruption = Interruption("requeued", "the job was never submitted to Slurm")
        elif interruption is not None and interruption.kind == "cancelled" and self._was_given_up:
            # An earlier daemon cancelled the job, for example because it hung.
            interruption = None
        elif interruption is None and not self.directory.journal.exists() and _found_no_controller(remains):
            interruption = Interruption("requeued", "the job began while Slurm's controller was down")
        cause = _CAUSES.get(job.state) if job is not None and word else None
        return msgspec.structs.replace(
            remains, exit_code=code, interruption=interruption, last_word=word, last_cause=cause
        )


def _could_not_start(job: SlurmJob) -> bool:
    """Whether Slurm holds the job because it could not launch it, for example after a failed prolog. Queued again at once, such
    a job drains node after node."""
    return job.restarts > 0 and job.reason.replace("_", " ").startswith("launch fail")


def _found_no_controller(remains: Remains) -> bool:
    """Whether srun ended because it did not reach the controller: no fault of the run."""
    return any(line.startswith("srun: error: ") and _AWAY in line for line in remains.output_tail)


def _last_word(job: SlurmJob | None) -> str:
    if job is not None and _could_not_start(job):
        return f"slurm: job {job.job} was not started: {job.reason}"
    if job is None or job.state in ("COMPLETED", *WAITING) or job.state not in ENDED:
        return ""
    where = f" on {job.nodes}" if job.nodes else ""
    reason = f", {job.reason}" if job.reason and job.reason != "NonZeroExitCode" else ""
    return f"slurm: {job.state}: job {job.job}{where}, exit code {job.exit_code}{reason}"


def _interruption(job: SlurmJob | None, signal: str, exit_code: int | None) -> Interruption | None:
    """The interruption if Slurm ended the attempt without a fault of the run. `signal` is the one that the job got, or ""."""
    if job is not None and job.restarts:
        if _could_not_start(job):
            return None
        return Interruption("requeued", f"Slurm put job {job.job} back into its queue")
    state, number = (job.state, job.job) if job is not None else ("", "")
    if state == "PREEMPTED":
        return Interruption("preempted", f"Slurm preempted job {number}")
    if state in ("TIMEOUT", "DEADLINE"):
        return Interruption("time limit", f"Slurm ended job {number} at its time limit")
    if state == "CANCELLED":
        return Interruption("cancelled", f"scancel of job {number}")
    if signal and exit_code == 0:
        return Interruption("time limit", f"Slurm signalled job {number} to end ({signal})")
    return None


class SlurmLauncher:
    """Starts attempts as Slurm jobs."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    @classmethod
    def of(cls, settings: Settings) -> SlurmLauncher:
        """A launcher with its own controller, whose threads start with the first attempt."""
        return cls(Controller(settings.slurm_poll_seconds))

    @staticmethod
    def places(settings: Settings) -> int:
        """Maximum number of concurrent jobs; 0 without sbatch."""
        return settings.slurm_jobs if shutil.which("sbatch") is not None else 0

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        """Write the order and the job's script, and queue the submission. Returns the attempt and torchrun's argv. Raises
        `OSError`."""
        directory.create(order)
        torchrun = slurm_script.argv(order.spec, directory)
        text = slurm_script.script(order, directory, torchrun)
        write_atomic(directory.script_file, text.encode())
        # Slurm would create it with other permissions.
        directory.output_log.touch(mode=0o600)
        process = ProcessFile(pid=0, create_time=time.time(), host=host_name(), devices=devices)
        # Before the submission: the next daemon must know that a job may exist.
        directory.write_process(process)
        env = job_environment(os.environ)
        submission = self._controller.submit(str(directory.path), str(directory.script_file), env)
        return SlurmAttempt(directory, self._controller, process, submission), torchrun

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        """Find the job of an attempt that an earlier daemon claimed, if there is one."""
        return SlurmAttempt(directory, self._controller, directory.process())
