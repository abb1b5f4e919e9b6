"""Both sides of each tolerance of training: what counts as a spike, and how far a redone step may be off."""

from __future__ import annotations

import math

import msgspec
import pytest

from sftd.domain.log.events import SourceFigures, StepCompleted
from sftd.domain.repro.steps import REDONE_DIFFERS, compare
from sftd.domain.run.loss_watch import LossWatch, losses_before

WAS = StepCompleted(
    step=3,
    epoch=0,
    loss=2.0,
    grad_norm=8.0,
    lr=1e-5,
    tokens=100,
    tokens_real=120,
    tokens_padded=128,
    tokens_total=300,
    samples=4,
    samples_digest="d",
    seconds=1.0,
)


def differing(*, is_exact: bool, dtype: str = "", was: StepCompleted = WAS, **redone: object) -> set[str]:
    """Names of the numbers for which a redo of a step is reported."""
    now = msgspec.structs.replace(was, **redone)
    anomaly = compare(was, now, is_exact=is_exact, dtype=dtype).anomaly
    assert anomaly is None or (anomaly.step, anomaly.what) == (3, REDONE_DIFFERS)
    return set(anomaly.detail) if anomaly else set()


@pytest.mark.parametrize(
    ("dtype", "name", "tolerance"),
    [
        ("bfloat16", "loss", 0.02),
        ("bfloat16", "grad_norm", 0.2),
        # An older attempt did not say its dtype.
        ("", "loss", 0.02),
        ("", "grad_norm", 0.2),
        ("float32", "loss", 1e-4),
        ("float32", "grad_norm", 1e-3),
    ],
)
def test_rounding_ends_at_its_tolerance(dtype: str, name: str, tolerance: float) -> None:
    was = getattr(WAS, name)
    # The tolerance is a share of the larger of the two.
    for factor in (1 - 0.99 * tolerance, 1 / (1 - 0.99 * tolerance)):
        assert differing(is_exact=False, dtype=dtype, **{name: was * factor}) == set()
        assert differing(is_exact=True, dtype=dtype, **{name: was * factor}) == {name}
    for factor in (1 - 1.01 * tolerance, 1 / (1 - 1.01 * tolerance)):
        assert differing(is_exact=False, dtype=dtype, **{name: was * factor}) == {name}


def test_figures_are_compared_bit_for_bit_if_the_record_has_them() -> None:
    sources = {"a": SourceFigures(rows=1, tokens=2, loss=1.5)}
    figures = {"token_accuracy": 0.5, "entropy": math.nan, "sources": sources}
    was = msgspec.structs.replace(WAS, **figures)
    assert differing(is_exact=True, was=was) == set()
    others = {
        "token_accuracy": 0.25,
        "entropy": 1.0,
        "sources": {"a": SourceFigures(rows=1, tokens=2, loss=1.25)},
    }
    for name, value in others.items():
        assert differing(is_exact=True, was=was, **{name: value}) == {name}
        # Rounding changes which of two tokens is more probable, and an older sftd recorded none.
        assert differing(is_exact=False, was=was, **{name: value}) == set()
        assert differing(is_exact=True, **{name: value}) == set()


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr"])
@pytest.mark.parametrize("towards", [0.0, math.inf])
def test_where_steps_are_exact_the_last_bit_counts(name: str, towards: float) -> None:
    next_one = math.nextafter(getattr(WAS, name), towards)
    assert differing(is_exact=True, **{name: next_one}) == {name}
    assert differing(is_exact=False, dtype="float32", **{name: next_one}) == (
        {"lr"} if name == "lr" else set()
    )


def test_what_was_trained_is_never_rounded() -> None:
    for dtype in ("bfloat16", "float32"):
        other = {"tokens": 101, "samples_digest": "e", "lr": 1.0000001e-5}
        assert differing(is_exact=False, dtype=dtype, **other) == set(other)
    assert differing(is_exact=True, seconds=9.0, tokens_padded=256, epoch=1) == set()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_number_is_near_one_and_equals_itself(bad: float) -> None:
    assert differing(is_exact=False, loss=bad) == {"loss"}
    nan = msgspec.structs.replace(WAS, loss=bad)
    assert differing(is_exact=False, was=nan, loss=2.0) == {"loss"}
    for is_exact in (True, False):
        assert differing(is_exact=is_exact, was=nan) == set()


@pytest.mark.parametrize("factor", [1.0, 2.5, 3.0])
def test_a_loss_of_exactly_the_factor_times_the_median_is_no_spike(factor: float) -> None:
    losses = [1.0] * 7 + [2.0, 2.5] + [9.0] * 7
    assert len(losses) == 16
    watch = LossWatch(factor, losses)
    # An even number of losses: the mean of the two in the middle.
    assert watch.median == 2.25
    assert watch.judge(factor * 2.25, 1.0) is None
    assert watch.judge(math.nextafter(factor * 2.25, math.inf), 1.0) == "loss_spike"
    assert watch.judge(-1e9, 1.0) is None, "only what is above"
    watch.add(9.0)
    assert watch.median == 2.5


def test_a_spike_is_judged_before_its_own_loss_counts_and_by_the_last_64() -> None:
    watch = LossWatch(2.0, [100.0] * 64)
    assert watch.judge(200.1, 1.0) == "loss_spike"
    for _ in range(32):
        watch.add(1.0)
    assert watch.median == 50.5
    watch.add(1.0)
    assert watch.median == 1.0
    assert watch.judge(2.1, 1.0) == "loss_spike"
    assert watch.judge(2.0, 1.0) is None


def test_fifteen_losses_are_too_few_and_those_that_are_no_numbers_do_not_count() -> None:
    fifteen = [1.0] * 15
    for losses, median in (
        (fifteen, None),
        ([*fifteen, math.nan, math.inf], None),
        ([*fifteen, 1.0], 1.0),
    ):
        watch = LossWatch(2.0, losses)
        assert watch.median == median
        assert watch.judge(2.1, 1.0) == (None if median is None else "loss_spike")
    watch.add(math.nan)
    assert watch.median == 1.0


def test_a_resumed_watch_knows_the_losses_up_to_its_step_alone() -> None:
    steps = [msgspec.structs.replace(WAS, step=n, loss=float(n)) for n in range(1, 101)]
    assert losses_before(steps, 80) == [float(n) for n in range(17, 81)]
    redone = msgspec.structs.replace(WAS, step=80, loss=0.5)
    assert losses_before([*steps, redone], 80)[-2:] == [79.0, 0.5]
