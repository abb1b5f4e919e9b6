"""Both sides of each tolerance: how far a step that is computed again may be off, and when two curves part."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from sftd.domain.compare.curves import CurvePoint, Curves
from sftd.domain.compare.differences import part
from sftd.domain.log import events as e
from sftd.domain.repro.steps import compare
from sftd.domain.run.exactness import compare_with_log
from sftd.domain.run.state import Run
from tests.builders.log.run_log import step

TOLERANCES = [
    ("loss", "bfloat16", 0.02),
    ("grad_norm", "bfloat16", 0.2),
    ("loss", "float32", 1e-4),
    ("grad_norm", "float32", 1e-3),
]


def redone(exact: bool, dtype: str, **changed: Any) -> e.AnomalyDetected | None:
    was, now = step(3, grad_norm=1.5), step(3, **{"grad_norm": 1.5} | changed)
    return compare(was, now, is_exact=exact, dtype=dtype).anomaly


@pytest.mark.parametrize(("number", "dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_allowed_up_to_its_tolerance(
    number: str, dtype: str, tolerance: float, sign: int
) -> None:
    was = {"loss": 2.0, "grad_norm": 1.5}[number]
    # Relative to the larger of the two.
    edge = was / (1 - tolerance) if sign > 0 else was * (1 - tolerance)
    near, far = was + (edge - was) * 0.999, was + (edge - was) * 1.001
    assert redone(False, dtype, **{number: near}) is None
    found = redone(False, dtype, **{number: far})
    assert found is not None
    assert found.step == 3
    assert found.detail == {number: {"recorded": was, "redone": far}}
    # Bit for bit nothing is near.
    last_bit = math.nextafter(was, math.inf)
    assert redone(True, dtype, **{number: last_bit}) is not None
    assert redone(False, dtype, **{number: last_bit}) is None


@pytest.mark.parametrize(
    ("number", "value"), [("lr", math.nextafter(1e-5, 1)), ("tokens", 101), ("samples_digest", "d4")]
)
def test_what_was_trained_is_never_rounded(number: str, value: object) -> None:
    for exact in (True, False):
        found = redone(exact, "bfloat16", **{number: value})
        assert found is not None
        assert found.detail.keys() == {number}


def test_a_step_that_the_log_does_not_have_is_compared_with_nothing() -> None:
    assert compare_with_log({}, Run("r"), step(3)) is None
    assert redone(True, "float32", loss=2.0) is None


def curves(number: str, values: list[float], first: int = 1) -> Curves:
    found = Curves()
    for n, value in enumerate(values, first):
        found.add(msgspec.convert(msgspec.to_builtins(step(n, **{number: value})), CurvePoint))
    return found


@pytest.mark.parametrize(("number", "dtype", "tolerance"), TOLERANCES)
def test_curves_part_beyond_the_tolerance_of_their_dtype(number: str, dtype: str, tolerance: float) -> None:
    near, far = 2.0 * (1 - tolerance * 0.999), 2.0 * (1 - tolerance * 1.001)
    one, other = [2.0] * 6, [2.0, 2.0, near, near, far, near]
    pair = curves(number, one), curves(number, other)
    found = part(*pair, "other", {dtype})
    assert (found.first, found.last, found.steps) == (1, 6, 6)
    assert found.bits == {number: 3}
    assert found.rounding == {number: 5}
    assert (found.at, found.beyond_rounding) == (3, 5)
    # Two dtypes round as the coarser does.
    mixed = part(*pair, "other", {"bfloat16", "float32"})
    assert mixed.rounding == ({number: 5} if dtype == "bfloat16" else {})


def test_curves_are_compared_over_the_steps_that_both_have() -> None:
    one, other = curves("loss", [1.0, 2.0, 3.0, 4.0, 5.0]), curves("loss", [3.0, 4.0, 9.0, 9.0], first=3)
    found = part(one, other, "other", {"float32"})
    assert (found.first, found.last, found.steps, found.at) == (3, 5, 3, 5)
    assert (one.at("loss", 4), other.at("loss", 4)) == (4.0, 4.0)
    assert list(other.values("loss", 1, 4)) == [3.0, 4.0]
    none = part(one, curves("loss", [1.0], first=9), "other", {"float32"})
    assert (none.steps, none.at, none.bits) == (0, None, {})
