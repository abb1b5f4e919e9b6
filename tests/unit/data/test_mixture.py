"""Mixtures: every place as if counted one by one, no row lost or read twice, across stages, ends of sources and forks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sftd.domain.data.mixture import Mixture, MixtureStart, SourceSize, limit
from sftd.domain.spec.data_section import Data, Source, Stage

BATCH, PLACES = 4, 90
WEIGHTS = st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5, 7.0])


def source(number: int, **fields: Any) -> Source:
    return Source(name=f"s{number}", files=["f"], **fields)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Data, list[SourceSize]]:
    count = draw(st.integers(1, 4))
    ends = draw(st.lists(st.sampled_from(["repeat", "stop"]), min_size=count, max_size=count))
    sizes = [SourceSize(draw(st.integers(1, 30)), draw(st.integers(30, 900))) for _ in range(count)]
    if draw(st.booleans()):
        epochs = st.sampled_from([None, 0.5, 1.0, 2.5])
        return Data(sources=[source(n, epochs=draw(epochs)) for n in range(count)]), sizes
    weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count).filter(any))
    sources = [
        source(n, weight=weight, on_exhausted=end, max_rows=draw(st.sampled_from([None, 5])))
        for n, (weight, end) in enumerate(zip(weights, ends, strict=True))
    ]
    stages = [
        Stage(until_step=2, weights={"s0": 3.0}),
        Stage(until_step=6, weights={"s0": 0.5, f"s{count - 1}": 1.0}),
    ]
    by = draw(st.sampled_from(["rows", "tokens"]))
    return Data(sources=sources, weights_by=by, stages=stages[: draw(st.integers(0, 2))]), sizes


@given(mixtures())
def test_any_slice_is_the_places_one_by_one_and_each_source_goes_on_where_it_was(
    drawn: tuple[Data, list[SourceSize]],
) -> None:
    data, sizes = drawn
    mixture = Mixture(data, sizes, batch_size=BATCH)
    whole = mixture.at(0, PLACES)
    assert whole == [one for place in range(PLACES) for one in mixture.at(place, 1)]
    cursors = Counter({s.name: 0 for s in data.sources})
    for place, (number, row) in enumerate(whole):
        assert mixture.cursors(place) == cursors
        assert row == cursors[f"s{number}"]
        cursors[f"s{number}"] += 1


@given(mixtures(), mixtures(), st.integers(0, PLACES))
def test_a_fork_with_other_weights_loses_no_row_and_reads_none_twice(
    drawn: tuple[Data, list[SourceSize]], other: tuple[Data, list[SourceSize]], position: int
) -> None:
    """Sources of the other mixture with the same name go on; the others begin."""
    read = Mixture(*drawn, batch_size=BATCH).cursors(position)
    fork = Mixture(*other, batch_size=BATCH, start=MixtureStart(3, read))
    cursors = [read.get(s.name, 0) for s in other[0].sources]
    for number, row in fork.at(MixtureStart(3, read).position, PLACES):
        assert row == cursors[number]
        cursors[number] += 1


@given(mixtures())
def test_a_pass_over_sources_that_end_reads_each_as_often_as_it_says(
    drawn: tuple[Data, list[SourceSize]],
) -> None:
    data, sizes = drawn
    data = Data(sources=data.sources, weights_by=data.weights_by)
    mixture = Mixture(data, sizes, batch_size=BATCH)
    if mixture.epoch_rows is None or any(s.weight == 0 for s in data.sources):
        return
    ends = {s.name: limit(s, rows) for s, rows in zip(data.sources, mixture.rows, strict=True)}
    assert mixture.cursors(mixture.epoch_rows) == ends


@given(st.lists(st.integers(1, 50), min_size=2, max_size=2), st.integers(0, 10_000))
def test_two_sources_never_stray_a_row_from_their_shares(weights: list[int], places: int) -> None:
    data = Data(sources=[source(n, weight=float(weight)) for n, weight in enumerate(weights)])
    mixture = Mixture(data, [SourceSize(9, 9)] * 2, batch_size=BATCH)
    for count, weight in zip(mixture.cursors(places).values(), weights, strict=True):
        assert abs(count - places * weight / sum(weights)) <= 0.5 + 1e-9


def test_weights_by_tokens_give_shares_of_the_trained_tokens() -> None:
    """The rows of one source are ten times as long."""
    data = Data(sources=[source(0, weight=1.0), source(1, weight=1.0)], weights_by="tokens")
    mixture = Mixture(data, [SourceSize(100, 1000), SourceSize(10, 1000)], batch_size=BATCH)
    assert mixture.cursors(110) == {"s0": 100, "s1": 10}


def test_a_stage_changes_the_shares_from_the_step_after_it() -> None:
    data = Data(
        sources=[source(0, weight=1.0), source(1, weight=0.0)],
        stages=[
            Stage(until_step=2, weights={"s0": 0.0, "s1": 1.0}),
            Stage(until_step=3, weights={"s1": 1.0}),
        ],
    )
    mixture = Mixture(data, [SourceSize(9, 9)] * 2, batch_size=BATCH)
    shares = [Counter(n for n, _ in mixture.at(step * BATCH, BATCH)) for step in range(4)]
    assert shares == [{1: 4}, {1: 4}, {0: 2, 1: 2}, {0: 4}]
    # A fork after step 1 reads one more step of the first stage.
    fork = Mixture(data, [SourceSize(9, 9)] * 2, batch_size=2, start=MixtureStart(1, {"s1": 4}))
    assert [n for n, _ in fork.at(4, 4)] == [1, 1, 0, 1]


def test_a_source_that_stops_leaves_its_places_to_the_others() -> None:
    sources = [source(0, weight=1.0, on_exhausted="stop"), source(1, weight=1.0)]
    mixture = Mixture(Data(sources=sources), [SourceSize(2, 9), SourceSize(3, 9)], batch_size=BATCH)
    assert mixture.at(0, 7) == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert mixture.epoch_rows is None
    assert [mixture.epoch(place) for place in (0, 4, 5, 6)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight": 0.7}, [0, 0, 1, 2, 0, 0, 0, 0, 0, 1]),
        ({}, [1, 2, 0, 1, 2, 1, 2, 0, 1, 2]),
    ],
)
def test_the_order_of_a_small_mixture_stays(fields: dict[str, float], expected: list[int]) -> None:
    """Another order would make runs that began before read other rows."""
    others = {"weight": 0.15} if fields else {}
    data = Data(sources=[source(0, **fields), source(1, **others), source(2, **others)])
    mixture = Mixture(data, [SourceSize(20, 9), SourceSize(40, 9), SourceSize(40, 9)], batch_size=BATCH)
    assert [number for number, _ in mixture.at(0, 10)] == expected
