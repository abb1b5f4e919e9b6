"""What every event has."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import msgspec

Micros = int
# What becomes of a run whose attempt was asked to stop.
AfterStop = Literal["cancelled", "paused", "queued"]
# A problem is shown in red and kept on the screen; a detail is left out where only news are shown, because an event before
# or after it says the same.
Severity = Literal["detail", "news", "problem"]


# What a person may choose to be notified of.
NoticeKind = Literal["ended", "failed", "anomaly", "started", "retrying", "paused"]


class NoticeFacts(NamedTuple):
    """What a notice says of a run besides the event. `loss` is a number in full, as text."""

    project: str
    name: str
    user: str
    step: int
    planned_steps: int
    loss: str | None

    @property
    def where(self) -> str:
        """How far the run is."""
        return f"at step {self.step:,} of {self.planned_steps:,}"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A fact. The class's name is its type name in the log; `schema_version` counts its shapes."""

    schema_version: ClassVar[int] = 1
    severity: ClassVar[Severity] = "news"
    is_lifecycle: ClassVar[bool] = False
    """Whether it changes what a mirror shows of the run beside its curves: its tags, its state."""
    ends_attempt: ClassVar[bool] = False
    """Whether no attempt computes after it: the attempt, or with it the run, has ended."""
    notice_kind: ClassVar[NoticeKind | None] = None
    """The kind of notice that is sent of it; such a type has a `notice`."""

    progress: ClassVar[str | None] = None
    """What a run's progress (`sftd logs`, a trainer without a daemon, the demo) says before the summary. None: not a part of it."""

    def summary(self) -> str:
        """One line that says what matters of it. Each type has its own; the words in it may be anybody's (see `printable`)."""
        raise NotImplementedError(type(self).__name__)

    def notice(self, run: NoticeFacts) -> str | None:
        """What the notice says after the run's name; None where none is sent, because that of another event says it."""
        raise NotImplementedError(type(self).__name__)

    def line(self, planned_steps: int) -> str | None:
        """Its line in a run's progress, if it is a part of it."""
        return None if self.progress is None else f"{self.progress}{self.summary()}"


class OfStep:
    """The words of an event that has one step: its number, of `planned_steps` where it is progress, and what `details` says."""

    __slots__ = ()
    step: int
    progress: ClassVar[str]

    def details(self) -> str:
        """The summary without the step."""
        raise NotImplementedError(type(self).__name__)

    def summary(self) -> str:
        """See `Event.summary`."""
        return f"step {self.step}  {self.details()}"

    def line(self, planned_steps: int) -> str:
        """See `Event.line`."""
        return f"step {self.step:>{len(str(planned_steps))}}/{planned_steps}  {self.progress}{self.details()}"
