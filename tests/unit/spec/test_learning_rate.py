"""The learning rate of each step, against values that were computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sftd.domain.spec.learning_rate import learning_rate
from sftd.domain.spec.sections import Optimizer, Scheduler
from sftd.domain.spec.spec import Spec

# The cosine's share of the way after one and after three of four quarters: half of one plus and minus the root of ½.
HIGH, LOW = 0.8535533905932737, 0.1464466094067262


def rates(kind: Any, planned: int, steps: int | None = None, **scheduler: Any) -> list[float]:
    """Of each 0-based step; the peak is 2."""
    spec = Spec(optimizer=Optimizer(lr=2.0), scheduler=Scheduler(type=kind, **scheduler))
    return [learning_rate(step, spec, planned) for step in range(planned if steps is None else steps)]


@pytest.mark.parametrize(
    ("kind", "scheduler", "expected"),
    [
        ("constant", {}, [2.0] * 6),
        # The floor is the decay's: a constant rate has none.
        ("constant", {"warmup_steps": 2, "min_lr_ratio": 0.25}, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", {}, [2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3]),
        ("linear", {"warmup_steps": 2}, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        # From 2 down to 0.5 in four steps of 0.375.
        ("linear", {"warmup_steps": 2, "min_lr_ratio": 0.25}, [1.0, 2.0, 2.0, 1.625, 1.25, 0.875]),
        ("cosine", {"warmup_steps": 2}, [1.0, 2.0, 2.0, 2 * HIGH, 1.0, 2 * LOW]),
        (
            "cosine",
            {"warmup_steps": 2, "min_lr_ratio": 0.25},
            [1.0, 2.0, 2.0, 0.5 + 1.5 * HIGH, 1.25, 0.5 + 1.5 * LOW],
        ),
        ("cosine", {"min_lr_ratio": 1.0}, [2.0] * 6),
        # The warm-up is 2, 1, 0 or all of the six steps.
        ("constant", {"warmup_ratio": 0.3}, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", {"warmup_ratio": 0.2}, [2.0, 2.0, 1.6, 1.2, 0.8, 0.4]),
        ("constant", {"warmup_ratio": 0.5, "warmup_steps": 0}, [2.0] * 6),
        ("cosine", {"warmup_ratio": 1.0}, [1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0]),
    ],
)
def test_each_step_has_the_rate_that_was_computed_by_hand(
    kind: str, scheduler: dict[str, Any], expected: list[float]
) -> None:
    assert rates(kind, 6, **scheduler) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_floor_is_reached_behind_the_last_step_and_kept(kind: str) -> None:
    assert rates(kind, 4, 8, min_lr_ratio=0.25)[4:] == [0.5] * 4
    assert rates(kind, 4, min_lr_ratio=0.25)[-1] > 0.5


def test_a_share_of_the_steps_is_rounded_to_the_nearest_and_halves_to_even() -> None:
    # 2.4, 2.6, 2.5 and 3.5 steps.
    assert [
        sum(rate < 2.0 for rate in rates("constant", planned, warmup_ratio=0.1)) + 1
        for planned in (24, 26, 25, 35)
    ] == [2, 3, 2, 4]
