"""A hung attempt is distinguished from a slow one, and from a daemon that was asleep."""

from __future__ import annotations

from sftd.daemon.watchdog import Watchdog
from sftd.domain.spec.sections import Launch


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watch(clock: Clock, watchdog: Watchdog, seconds: float) -> float | None:
    """Tick once a second."""
    for _ in range(round(seconds)):
        clock.now += 1
        if (silent := watchdog.silent_too_long()) is not None:
            return silent
    return None


def test_silence_beyond_the_limit_is_a_hang_and_progress_begins_anew() -> None:
    clock = Clock()
    watchdog = Watchdog(Launch(hang_seconds=60), clock)
    watchdog.progressed([1.0])
    assert watch(clock, watchdog, 60) is None
    watchdog.progressed([])
    assert watch(clock, watchdog, 60) is None
    assert watch(clock, watchdog, 1) == 61


def test_the_start_takes_its_time() -> None:
    clock = Clock()
    watchdog = Watchdog(Launch(hang_seconds=60), clock)
    watchdog.progressed([])
    assert watch(clock, watchdog, 900) is None
    assert watch(clock, watchdog, 1) == 901


def test_long_steps_lengthen_the_limit() -> None:
    clock = Clock()
    watchdog = Watchdog(Launch(hang_seconds=60, hang_factor=10), clock)
    watchdog.progressed([1.0, 30.0, 30.0])
    assert watchdog.limit == 300
    assert watch(clock, watchdog, 300) is None
    assert watch(clock, watchdog, 1) == 301
    watchdog.progressed([0.1] * 200)
    assert watchdog.limit == 60


def test_time_that_the_daemon_slept_through_does_not_count() -> None:
    clock = Clock()
    watchdog = Watchdog(Launch(hang_seconds=60), clock)
    watchdog.progressed([1.0])
    clock.now += 10_000
    assert watchdog.silent_too_long() is None
    assert watch(clock, watchdog, 40) is None


def test_zero_turns_it_off() -> None:
    clock = Clock()
    watchdog = Watchdog(Launch(hang_seconds=0), clock)
    assert watchdog.limit is None
    assert watch(clock, watchdog, 10_000) is None
