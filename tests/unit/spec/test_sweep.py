"""`--grid`: what people write, and the runs that come of it."""

from __future__ import annotations

import pytest

from sftd.domain.errors import Refused
from sftd.domain.spec.sections import Trainer
from sftd.domain.spec.spec import Spec
from sftd.wire.spec import grid


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("optimizer.lr=1e-5,2e-5", ["1e-5", "2e-5"]),
        ("a=1", ["1"]),
        ("a= x , y ", ["x", "y"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a='x,y',z", ["'x,y'", "z"]),
        ("a={b: 1, c: 2},{}", ["{b: 1, c: 2}", "{}"]),
        ("a=b=c", ["b=c"]),
    ],
)
def test_values_are_parted_at_commas_outside_brackets(option: str, values: list[str]) -> None:
    assert grid.parse_grid([option]) == {option.partition("=")[0]: values}


def test_a_name_begins_with_what_is_different() -> None:
    spec = Spec(trainer=Trainer(experiment_name="llama sft"))
    named = grid._named(spec, "sweep-1", {"optimizer.lr": "1e-5", "model.megatron.seed": "2"})
    assert named.trainer.experiment_name == "lr 1e-5 seed 2 llama sft"


@pytest.mark.parametrize(
    "options", [["a"], ["a="], ["=1"], ["a=1", "a=2"], ["a=1,1"], ["a=1, ,2"], ["a=1,,2"], ["a=1,"]]
)
def test_a_grid_that_says_nothing_or_twice_the_same_is_refused(options: list[str]) -> None:
    with pytest.raises(Refused) as refused:
        grid.parse_grid(options)
    assert refused.value.problems[0].fix
