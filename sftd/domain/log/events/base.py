"""The base of all event types."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import msgspec

Micros = int
# The state of a run after its attempt has stopped on request.
AfterStop = Literal["cancelled", "paused", "queued"]
# A problem is shown in red and stays on the screen. A detail repeats an event before or after it, so short views omit it.
Severity = Literal["detail", "news", "problem"]
# The kinds of events that a user can be notified of.
NoticeKind = Literal["ended", "failed", "anomaly", "started", "retrying", "paused", "evaluated"]


class NoticeFacts(NamedTuple):
    """The facts of a run that a notice contains besides the event. `loss` is text with full precision."""

    project: str
    name: str
    user: str
    step: int
    planned_steps: int
    loss: str | None

    @property
    def where(self) -> str:
        """The run's progress, for a sentence."""
        return f"at step {self.step:,} of {self.planned_steps:,}"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A fact in the log. The class name is the type name; `schema_version` counts the versions of its fields."""

    schema_version: ClassVar[int] = 1
    severity: ClassVar[Severity] = "news"
    is_lifecycle: ClassVar[bool] = False
    """Whether the event changes a mirror's tags or state of the run, rather than only its curves."""
    ends_attempt: ClassVar[bool] = False
    """Whether the event ends the attempt, or the attempt and the run."""
    notice_kind: ClassVar[NoticeKind | None] = None
    """The kind of notice for this event. A type with a kind implements `notice`."""

    progress: ClassVar[str | None] = None
    """Prefix of the event's line in a run's progress (`sftd logs`, a trainer without a daemon, the demo). None: no line."""

    def summary(self) -> str:
        """The event in one line. The line may contain untrusted text (see `printable`)."""
        raise NotImplementedError(type(self).__name__)

    def notice(self, run: NoticeFacts) -> str | None:
        """The text of the notice after the run's name; None if the notice of another event covers this one."""
        raise NotImplementedError(type(self).__name__)

    def line(self, planned_steps: int) -> str | None:
        """The event's line in a run's progress; None if the progress does not show it."""
        return None if self.progress is None else f"{self.progress}{self.summary()}"


class OfStep:
    """Summary and progress line of an event of one step: the step's number, then `details`."""

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
