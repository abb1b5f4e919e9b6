"""The fold for events of files: pinned, reduced and deleted checkpoints, and removed runs."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sftd.domain.log import events as e
from sftd.domain.run.folds.evaluations import without
from sftd.domain.run.state import Run

_set = msgspec.structs.replace


def _pinned(event: e.CheckpointPinned, run: Run, recorded: e.Recorded) -> Run:
    return _set(
        run,
        checkpoints=tuple(
            _set(c, forks=(*c.forks, event.fork)) if c.step == event.step else c for c in run.checkpoints
        ),
    )


def _unpinned(event: e.CheckpointUnpinned, run: Run, recorded: e.Recorded) -> Run:
    def without(forks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in forks if name != event.fork)

    pins = {step: without(forks) for step, forks in run.rejected_pins.items()}
    return _set(
        run,
        checkpoints=tuple(_set(c, forks=without(c.forks)) for c in run.checkpoints),
        rejected_pins={step: forks for step, forks in pins.items() if forks},
    )


def _reduced(event: e.CheckpointReduced, run: Run, recorded: e.Recorded) -> Run:
    return _set(
        run,
        checkpoints=tuple(
            _set(
                c,
                path=event.path,
                bytes=event.bytes,
                manifest_digest=event.manifest_digest,
                weights_only=True,
            )
            if c.path == event.former_path
            else c
            for c in run.checkpoints
        ),
    )


def _deleted(event: e.CheckpointDeleted, run: Run, recorded: e.Recorded) -> Run:
    kept = tuple(c for c in run.checkpoints if c.path != event.path)
    gone = any(c.step == event.step for c in run.checkpoints) and not any(c.step == event.step for c in kept)
    return _set(run, checkpoints=kept, evaluations=without(run, event.step) if gone else run.evaluations)


def _removed(event: e.RunRemoved, run: Run, recorded: e.Recorded) -> Run:
    return _set(run, removed_at=recorded.occurred_at)


FILES: dict[type[e.Event], Callable[..., Run]] = {
    e.CheckpointPinned: _pinned,
    e.CheckpointUnpinned: _unpinned,
    e.CheckpointReduced: _reduced,
    e.CheckpointDeleted: _deleted,
    e.RunRemoved: _removed,
}
