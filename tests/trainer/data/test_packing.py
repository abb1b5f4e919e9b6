"""Packing to a token budget: every sample once, within the budget, balanced, and the same order in every layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.trainer.data.packing import Planner, cut, packed_order
from sftd.trainer.data.rows import Ints

LIMIT = 64
lengths_of_a_step = st.lists(st.integers(2, LIMIT), min_size=1, max_size=200).map(
    lambda values: np.array(values, np.int64)
)
budgets = st.integers(LIMIT, 5 * LIMIT)


def planner(budget: int, *, unit: int = 1, one_length: bool = False, multiple: int = 1) -> Planner:
    return Planner(size=1, tokens=budget, packed=True, one_length=one_length, multiple=multiple, unit=unit)


def shortest_cut(lengths: Ints, count: int) -> int:
    """Tokens of the largest piece in the best cut into at most `count` pieces, by dynamic programming."""
    sums = np.concatenate(([0], np.cumsum(lengths)))
    best = sums[1:].copy()
    for _ in range(count - 1):
        best = np.array(
            [
                min(max(best[i - 1] if i else 0, sums[j] - sums[i]) for i in range(j))
                for j in range(1, sums.size)
            ]
        )
    return int(best[-1])


@given(lengths_of_a_step, budgets, st.sampled_from([1, 2, 3, 4, 8]))
def test_every_sample_is_packed_once_within_the_budget(lengths: Ints, budget: int, unit: int) -> None:
    members, sizes = planner(budget, unit=unit).plan(lengths)
    assert sorted(np.concatenate(members)) == list(range(lengths.size))
    assert [max(int(lengths[m].sum()), 1) for m in members] == sizes.tolist()
    assert sizes.max() <= budget
    assert len(members) % unit == 0
    # Not one round of micro-batches more than these samples need in this order.
    fewest, tokens = 1, 0
    for length in lengths[np.concatenate(members)]:
        fewest, tokens = (fewest, tokens + length) if tokens + length <= budget else (fewest + 1, length)
    assert len(members) - fewest < unit


@given(lengths_of_a_step, budgets, st.sampled_from([1, 2, 3, 4]))
def test_the_order_and_so_the_samples_of_a_step_do_not_depend_on_the_layout(
    lengths: Ints, budget: int, unit: int
) -> None:
    members, sizes = planner(budget, unit=unit, one_length=True).plan(lengths)
    assert np.array_equal(np.concatenate(members), packed_order(lengths))
    assert np.array_equal(packed_order(lengths.copy()), packed_order(lengths))
    assert len(set(sizes.tolist())) == 1
    assert len(members) % unit == 0


@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=14), st.integers(LIMIT, 3 * LIMIT))
def test_the_largest_piece_is_as_small_as_can_be(values: list[int], budget: int) -> None:
    lengths = np.array(values, np.int64)
    pieces = cut(lengths, budget, 2)
    assert max(int(lengths[piece].sum()) for piece in pieces) == shortest_cut(lengths, len(pieces))


@given(lengths_of_a_step, budgets, st.sampled_from([1, 2, 4]))
def test_the_largest_piece_is_within_one_sample_of_the_mean(lengths: Ints, budget: int, unit: int) -> None:
    pieces = [int(lengths[m].sum()) for m in planner(budget, unit=unit).plan(lengths)[0]]
    # Cutting at the multiples of the mean goes over it by less than one sample; the best cut is no worse.
    assert max(pieces) < lengths.sum() / len(pieces) + lengths.max()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_realistic_mix_fills_the_budget_and_balances_the_ranks(ranks: int) -> None:
    """Log-normal lengths, median 350, cut at 4096: 512 samples into micro-batches of 16384 tokens."""
    rng = np.random.default_rng(5)
    lengths = np.minimum(rng.lognormal(np.log(350), 1.0, 512), 4096).astype(np.int64)
    members, _ = planner(16384, unit=ranks).plan(lengths)
    of_rank = [
        int(lengths[np.concatenate(part)].sum()) for part in np.array_split(np.array(members, object), ranks)
    ]
    assert max(of_rank) < 1.1 * np.mean(of_rank)
    order = packed_order(lengths)
    eighths = [int(lengths[part].sum()) for part in np.array_split(order, 8)]
    assert max(eighths) < 1.03 * np.mean(eighths)


def test_padded_micro_batches_are_filled_up_for_every_rank() -> None:
    lengths = np.array([5, 9, 3, 7, 4])
    members, sizes = Planner(size=2, tokens=0, packed=False, one_length=False, multiple=4, unit=2).plan(
        lengths
    )
    assert [m.tolist() for m in members] == [[0, 1], [2, 3], [4], []]
    assert sizes.tolist() == [12, 8, 4, 4]
