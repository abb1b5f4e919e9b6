"""What `sftd compare` says of where curves part: "the same bit for bit" only of curves that are."""

from __future__ import annotations

import pytest

from sftd.cli.compare.words import parting_lines
from sftd.domain.compare.differences import Parting


@pytest.mark.parametrize(
    ("first", "last", "bits", "rounding", "lines"),
    [
        (1, 0, {}, {}, ["A and B have no step in common"]),
        (1, 9, {}, {}, ["A and B are the same bit for bit over the steps 1 to 9 that both have"]),
        (4, 4, {}, {}, ["A and B are the same bit for bit over the step 4 that both have"]),
        (
            1,
            9,
            {"lr": 3},
            {},
            [
                "A and B: loss and gradient norm are the same bit for bit over steps 1 to 9",
                "  other learning rate from 3",
            ],
        ),
        (
            1,
            9,
            {"loss": 5, "grad_norm": 4},
            {},
            [
                "A and B part at step 4, by no more than rounding up to step 9",
                "  other loss from 5, gradient norm from 4",
            ],
        ),
        (
            1,
            9,
            {"samples": 2, "loss": 2},
            {"loss": 7},
            [
                "A and B part at step 2; beyond rounding from 7, the same bit for bit until then",
                "  other rows from 2, loss from 2",
            ],
        ),
        (1, 9, {"loss": 1}, {"loss": 1}, ["A and B part at step 1", "  other loss from 1"]),
    ],
)
def test_a_parting_is_no_more_and_no_less_than_it_is(
    first: int, last: int, bits: dict[str, int], rounding: dict[str, int], lines: list[str]
) -> None:
    assert list(parting_lines(Parting("b", first, last, bits, rounding), "A", "B")) == lines
