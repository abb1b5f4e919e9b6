"""The goodput ledger: a run's time by account, folded from its events. Pure and exact: the accounts add up to the time
between submission and end to the microsecond, even if clocks changed.

The events cut a run's time into pieces, and each piece belongs to one account:

queued        waits for devices: from the submission, or a user's resume, to the claim of an attempt
starting      from the claim of the first attempt to its first step, less the validation before it
productive    `seconds` of steps that no earlier attempt has done
replayed      `seconds` of steps, validations and checkpoints that an earlier attempt has already done
validating    `seconds` of validations
checkpointing from `CheckpointStarted` to publication or failure, except while a step runs: the delay from saving
restarting    the cost of a restart beyond its replay: from the last step, validation or checkpoint of a failed attempt to
              its end, from there to the claim of the next attempt (back-off and waiting for devices), and from the claim
              of a later attempt to its first new step, less its replay
idle          waits for a user: from the end of a run to its resume
other         the rest of an attempt: between steps, answers to sample prompts, the end of the processes; while a step is
              being computed, the time since the previous step

A step's time is the `seconds` before its event. If these times overlap, the first event gets the common part. Time never
runs backwards: an event that is older than the one before it counts as simultaneous.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from sftd.domain.log import events as e

Account = Literal[
    "queued",
    "starting",
    "productive",
    "replayed",
    "validating",
    "checkpointing",
    "restarting",
    "idle",
    "other",
]
ACCOUNTS: tuple[Account, ...] = get_args(Account)
# The event types that cut the time.
TYPES = e.names(
    e.RunSubmitted,
    e.AttemptClaimed,
    e.StepCompleted,
    e.ValidationCompleted,
    e.CheckpointStarted,
    e.CheckpointPublished,
    e.AnomalyDetected,
    e.ResumeRequested,
    *e.types_where("ends_attempt"),
)
_MICROS = 1_000_000


class StepTime(msgspec.Struct, frozen=True):
    """The fields of `StepCompleted` that the ledger needs. Small, because a long run has a million steps."""

    step: int
    seconds: float | str


class Ledger(msgspec.Struct, frozen=True):
    """Microseconds by account, from `began_at` (the submission) to `until`."""

    began_at: e.Micros
    until: e.Micros
    micros: dict[Account, int]

    @property
    def wall_seconds(self) -> float:
        """Seconds from the submission to `until`."""
        return (self.until - self.began_at) / _MICROS

    @property
    def held_seconds(self) -> float:
        """Seconds in all accounts except queued and idle: the run held devices or was restarting."""
        return (self.until - self.began_at - self.micros["queued"] - self.micros["idle"]) / _MICROS

    @property
    def goodput(self) -> float | None:
        """The productive share of `held_seconds`; None while that is 0."""
        return self.seconds("productive") / self.held_seconds if self.held_seconds > 0 else None

    def seconds(self, account: Account) -> float:
        """Seconds of one account."""
        return self.micros[account] / _MICROS

    def as_json(self) -> dict[str, float | None]:
        """Seconds by account, `wall` and `goodput`, for JSON."""
        return {
            "goodput": self.goodput,
            "wall": self.wall_seconds,
            **{account: self.seconds(account) for account in ACCOUNTS},
        }


class Fold(msgspec.Struct, kw_only=True):
    """Folds a run's events of `TYPES`, in order, into a ledger. A fold can be stored and continued later."""

    micros: dict[Account, int] = msgspec.field(default_factory=lambda: dict.fromkeys(ACCOUNTS, 0))
    began: e.Micros | None = None
    # Time before the edge is booked. Time after it belongs to a claim, or else to the phase.
    edge: e.Micros = 0
    latest: e.Micros = 0
    phase: Account = "queued"
    ended: bool = False
    claims: list[tuple[Account, e.Micros, e.Micros]] = []
    attempts: int = 0
    highest_step: int = 0
    validated: int = -1
    published: int = 0
    saving: tuple[Account, e.Micros] | None = None

    def add(self, at: e.Micros, event: e.Event | StepTime) -> None:
        """Take in the next event, which occurred at `at`."""
        if self.began is None:
            self.began = self.latest = self.edge = at
        at = self.latest = max(at, self.latest)
        match event:
            case StepTime() | e.StepCompleted():
                self._step(at, event.step, event.seconds)
            case e.ValidationCompleted():
                is_new = event.step > self.validated
                self.validated = max(self.validated, event.step)
                account: Account = "validating" if is_new else "replayed"
                # Validations and checkpoints are booked later: a concurrent step has precedence, and its event follows.
                self.claims.append((account, at - _micros(event.seconds), at))
            case e.CheckpointStarted():
                is_new = event.step > self.published
                self.saving = ("checkpointing" if is_new else "replayed"), at
            case e.CheckpointPublished():
                self._saved(at)
                self.published = max(self.published, event.step)
            case e.AnomalyDetected(what="checkpoint_failed"):
                self._saved(at)
            case e.AttemptClaimed():
                self._turn(at, "restarting" if self.attempts else "starting")
                self.attempts += 1
            case e.AttemptFailed() | e.AttemptLost():
                # The tail of a failed attempt: an unfinished step, a hang, or the shutdown.
                if self.phase == "other":
                    self.phase = "restarting"
                self._turn(at, "restarting")
            case e.AttemptPaused():
                self._turn(at, "idle")
            case e.AttemptPreempted():
                self._turn(at, "queued")
            case e.RunSucceeded() | e.RunFailed() | e.RunCancelled():
                self._turn(at, "idle")
                self.ended = True
            case e.ResumeRequested():
                self._turn(at, "queued")
                self.ended = False

    def ledger(self, now: e.Micros) -> Ledger:
        """The ledger up to the end of the run, or up to `now` if it has not ended. The fold can continue afterwards."""
        micros, edge, claims = dict(self.micros), self.edge, list(self.claims)
        if not self.ended:
            self._close(max(now, self.edge))
        found = Ledger(self.began if self.began is not None else self.edge, self.edge, self.micros)
        self.micros, self.edge, self.claims = micros, edge, claims
        return found

    def _step(self, at: e.Micros, step: int, seconds: float | str) -> None:
        began = max(self.edge, at - _micros(seconds))
        self._close(began)
        is_new = step > self.highest_step
        self.micros["productive" if is_new else "replayed"] += at - began
        self.edge = at
        if is_new:
            self.highest_step = step
            self.phase = "other"

    def _saved(self, at: e.Micros) -> None:
        if self.saving is not None:
            self.claims.append((*self.saving, at))
            self.saving = None

    def _turn(self, at: e.Micros, phase: Account) -> None:
        """End the current phase and begin another."""
        self._close(at)
        self.phase = phase
        self.saving = None

    def _close(self, until: e.Micros) -> None:
        """Book all time up to `until`."""
        still = [(*self.saving, until)] if self.saving is not None else []
        for account, since, at in (*self.claims, *still):
            begin, end = max(since, self.edge), min(at, until)
            if end > begin:
                self.micros[self.phase] += begin - self.edge
                self.micros[account] += end - begin
                self.edge = end
        self.claims.clear()
        self.micros[self.phase] += until - self.edge
        self.edge = until


def _micros(seconds: float | str) -> int:
    number = float(seconds)
    return int(number * _MICROS) if math.isfinite(number) and number > 0 else 0
