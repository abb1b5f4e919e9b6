"""The timeline of a run: which attempt's step N is the run's step N, and which steps were computed again.

An attempt begins at a checkpoint and computes the steps after it again. The timeline holds the steps that led to the state
of the last attempt: the steps that led to its checkpoint, then its own. An attempt from a superseded checkpoint therefore
brings that checkpoint's steps back. The state of a run (`domain/run/fold.py`) applies the same rule to scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sftd.domain.log import events as e
from sftd.domain.spec.spec import OrderStart

Order = tuple[OrderStart, ...]
# The event types that `Timeline` needs.
TYPES = e.names(e.RunForked, e.AttemptClaimed, e.StepCompleted, e.CheckpointPublished, e.SamplesSkipped)


class Stretch(NamedTuple):
    """Consecutive steps `first` to `last` of one attempt. A place is the 0-based index of a step among all steps of the run in
    the log, redone ones included; `place` is that of `first`. `piece` is the part of the sample order that the steps read,
    None for the first part. `loaded` describes the attempt's environment, None if the log does not have it."""

    attempt: int
    first: int
    last: int
    place: int
    piece: OrderStart | None
    loaded: e.ModelLoaded | None


Line = tuple[Stretch, ...]


def cut(line: Line, step: int) -> Line:
    """A line up to a step."""
    return tuple(s._replace(last=min(s.last, step)) for s in line if s.first <= step)


def order_up_to(order: Order, step: int) -> Order:
    """The pieces of a sample order that begin at or before `step`."""
    # Not only before it: a fork's first piece begins at its fork step.
    return tuple(piece for piece in order if piece.step <= step)


def order_after_skip(order: Order, skipped: e.SamplesSkipped) -> Order:
    """The sample order after the skip."""
    return (*(o for o in order if o.step < skipped.step), OrderStart(skipped.step, skipped.sample))


class Timeline:
    """Takes a run's events in order. Types other than `TYPES` and `ModelLoaded` are ignored."""

    def __init__(self, events: Iterable[e.Event] = ()) -> None:
        # Attempts and steps in the log, and the step after which the last attempt began.
        self.attempt = self.count = self.from_step = 0
        self._line: Line = ()
        # The open stretch: its first step, the step that would continue it, and its place.
        self._first = self._next = self._place = 0
        self._past: list[Stretch] = []
        self._order: Order = ()
        self._saved: dict[int, tuple[Line, Order]] = {}
        self._loaded: e.ModelLoaded | None = None
        for event in events:
            self.add(event)

    @property
    def line(self) -> Line:
        """The timeline: stretches in ascending order, with a gap only where the log has one."""
        return (*self._line, *self._growing())

    @property
    def recorded(self) -> list[Stretch]:
        """All steps of the run, in the order of the log."""
        return [*self._past, *self._growing()]

    @property
    def last(self) -> int:
        """The timeline's last step; without steps, the step after which the last attempt began."""
        line = self.line
        return line[-1].last if line else self.from_step

    @property
    def _piece(self) -> OrderStart | None:
        return self._order[-1] if self._order else None

    def _growing(self) -> Iterator[Stretch]:
        if self._next > self._first:
            yield Stretch(self.attempt, self._first, self._next - 1, self._place, self._piece, self._loaded)

    def add(self, event: e.Event) -> None:
        """Take in the next event."""
        match event:
            case e.StepCompleted(step=step):
                self.add_step(step)
            case e.CheckpointPublished(step=step):
                self._saved[step] = self.line, self._order
            case e.AttemptClaimed(from_step=step):
                self._go_back(step)
                self.attempt += 1
                self._loaded = None
            case e.RunForked(step=step):
                # The events before this one are the parent's, up to the checkpoint.
                self._go_back(step)
                self._saved = {}
            case e.SamplesSkipped(step=step):
                line, _ = self._saved.get(step, (self.line, ()))
                self._end_stretch()
                self._order = order_after_skip(self._order, event)
                self._saved[step] = line, self._order
            case e.ModelLoaded():
                self._end_stretch()
                self._loaded = event

    def add_step(self, step: int) -> None:
        """Take in the next step of the log."""
        if step != self._next or self._first == self._next:
            self._end_stretch()
            self._line = cut(self._line, step - 1)
            self._first, self._place = step, self.count
        self._next = step + 1
        self.count += 1

    def _go_back(self, step: int) -> None:
        self._end_stretch()
        self.from_step = step
        self._order = self._saved[step][1] if step in self._saved else order_up_to(self._order, step)
        self._line = self.leading_to(step)

    def _end_stretch(self) -> None:
        self._past += self._growing()
        self._line = self.line
        self._first = self._next = 0

    def leading_to(self, step: int) -> Line:
        """The steps that led to the checkpoint of `step`; without such a checkpoint, the timeline's steps up to `step`."""
        line = self._saved[step][0] if step in self._saved else self.line
        return cut(line, step)

    def place(self, step: int) -> int | None:
        """The place of a step of the timeline; of a superseded step, the place of its last record. None if the log lacks it."""
        return _find(step, (*reversed(self.line), *reversed(self._past)))

    def before(self, step: int) -> int | None:
        """The place of the last record of `step` with the samples that the last attempt reads. None if the step is new."""
        return _find(step, (s for s in reversed(self.recorded) if s.piece == self._piece))

    def to_redo(self) -> dict[int, int]:
        """Recomputed step → place of the record that the last attempt must reproduce."""
        again = (s for s in self.recorded if s.attempt != self.attempt and s.piece == self._piece)
        return {step: place for step, place in places(again) if step > self.from_step}


def _find(step: int, stretches: Iterable[Stretch]) -> int | None:
    return next((s.place + step - s.first for s in stretches if s.first <= step <= s.last), None)


def places(stretches: Iterable[Stretch]) -> Iterator[tuple[int, int]]:
    """(step, place) of each step of some stretches."""
    for s in stretches:
        yield from zip(
            range(s.first, s.last + 1), range(s.place, s.place + s.last - s.first + 1), strict=True
        )


class LoggedStep(NamedTuple):
    """A step of a timeline: its event, its version in the stream, and the environment that computed it (empty if the log does
    not have it)."""

    event: e.StepCompleted
    version: int
    environment: dict[str, Any]


def logged_steps(recorded: Iterable[e.Recorded]) -> dict[int, LoggedStep]:
    """The timeline's steps by number."""
    timeline, steps = Timeline(), list[tuple[e.StepCompleted, int]]()
    for r in recorded:
        timeline.add(r.event)
        if isinstance(r.event, e.StepCompleted):
            steps.append((r.event, r.version))
    return {
        step: LoggedStep(*steps[place], stretch.loaded.environment if stretch.loaded else {})
        for stretch in timeline.line
        for step, place in places((stretch,))
    }
