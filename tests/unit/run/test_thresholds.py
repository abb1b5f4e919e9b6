"""Both sides of each limit by which the control plane judges: the last value that is let be, and the first that is not."""

from __future__ import annotations

import msgspec
import pytest

from sftd.domain.log import events as e
from sftd.domain.queue.order import Limits, latest_wait
from sftd.domain.repro.steps import compare
from sftd.operations.queries.queue import living
from sftd.settings import read
from sftd.store.queue.daemons import DaemonRow
from tests.builders.log.histories import step

SECOND = 1_000_000


def row(**changes: int | None) -> DaemonRow:
    at = {"started_at": 0, "seen_at": 0, "stopped_at": None} | changes
    return DaemonRow("d", "h", 1, 1.0, "/home", "{}", at["started_at"], at["seen_at"], at["stopped_at"])  # type: ignore[arg-type]


def test_a_daemon_lives_for_two_leases_after_it_was_seen() -> None:
    silent = read({"SFTD_LEASE_SECONDS": "30"}).silent_micros
    assert silent == 60 * SECOND
    seen = row(seen_at=100 * SECOND)
    assert living([seen], 160 * SECOND - 1, silent) == [seen]
    assert living([seen], 160 * SECOND, silent) == []
    assert living([row(seen_at=100 * SECOND, stopped_at=101 * SECOND)], 102 * SECOND, silent) == []


@pytest.mark.parametrize(
    ("dtype", "name", "near"),
    [
        ("float32", "loss", 1e-4),
        ("float32", "grad_norm", 1e-3),
        ("bfloat16", "loss", 0.02),
        ("bfloat16", "grad_norm", 0.2),
    ],
)
def test_a_redone_step_is_as_near_as_rounding_lets_it_be(dtype: str, name: str, near: float) -> None:
    """Where it was computed otherwise. Computed alike it must be the same bit for bit."""
    was = step(1)
    for factor, is_anomaly in ((0.99, False), (1.01, True)):
        # The difference is relative to the larger of the two.
        value = 1.0 / (1.0 - factor * near)
        redone = step(1, loss=value) if name == "loss" else _with_norm(value)
        found = compare(was, redone, is_exact=False, dtype=dtype).anomaly
        assert (found is not None) == is_anomaly
        exact = compare(was, redone, is_exact=True, dtype=dtype).anomaly
        assert exact == e.AnomalyDetected(
            step=1,
            what="redone step differs from the log",
            detail={name: {"recorded": 1.0, "redone": value}},
        )


def _with_norm(value: float) -> e.StepCompleted:
    return msgspec.structs.replace(step(1), grad_norm=value)


def test_what_was_trained_is_compared_exactly_however_it_was_computed() -> None:
    changes = ({"lr": 1.0001e-5}, {"tokens": 11}, {"samples_digest": "t"})
    for change in changes:
        redone = msgspec.structs.replace(step(1), **change)
        found = compare(step(1), redone, is_exact=False, dtype="bfloat16").anomaly
        assert found is not None
        assert found.detail.keys() == change.keys()


def test_no_back_off_is_longer_than_ten_minutes() -> None:
    """A later time was written by a clock that has been set back since: it keeps nobody waiting."""
    assert latest_wait(5) == 5 + 600 * SECOND


def test_of_two_daemons_limits_the_looser_holds() -> None:
    assert Limits(2, 8).loosened(Limits(5, 3)) == Limits(5, 8)
    assert Limits(2, None).loosened(Limits(None, 3)) == Limits(None, None)
    for limits in (Limits(), Limits(2), Limits(None, 3), Limits(2, 3)):
        assert Limits.told(limits.describe()) == limits
    assert Limits.told({"gpus": 1}) is None
