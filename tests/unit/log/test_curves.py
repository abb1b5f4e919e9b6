"""Curves of a run: the timeline's steps, their buckets, and where two of them part."""

from __future__ import annotations

import math
import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from sftd.cli.compare.words import letter
from sftd.cli.terminal.plot import Series, plot, scale_of, sparkline
from sftd.domain.compare.curves import Bucket, CurvePoint, Curves, RunCurves, thin, width_for
from sftd.domain.compare.differences import part
from sftd.domain.log import events as e
from tests.builders.log.histories import FAILED, SECOND, SUCCEEDED, claimed, published, step


def point(number: int, loss: float = 1.0, **changes: object) -> CurvePoint:
    return msgspec.convert(msgspec.to_builtins(step(number, loss, **changes)) | {"loss": loss}, CurvePoint)


def curves(losses: list[float], first: int = 1, **changes: object) -> Curves:
    found = Curves()
    for number, loss in enumerate(losses, first):
        found.add(point(number, loss, **changes))
    return found


def test_every_schema_version_of_a_step_is_a_point() -> None:
    old = msgspec.to_builtins(step(3))
    del old["mfu"], old["peak_memory_bytes"]
    assert msgspec.json.decode(msgspec.json.encode(old), type=CurvePoint).mfu is None
    assert set(CurvePoint.__struct_fields__) <= set(e.StepCompleted.__struct_fields__)


def test_a_later_attempt_draws_its_line_anew() -> None:
    history = RunCurves()
    events: list[e.Event | CurvePoint] = [
        *claimed(),
        *(point(n, n) for n in range(1, 6)),
        e.ValidationCompleted(step=2, loss=2.5, tokens=1, rows=1, seconds=1.0),
        e.ValidationCompleted(step=4, loss=4.5, tokens=1, rows=1, seconds=1.0),
        published(3),
        FAILED,
        *claimed(from_step=3, devices=4),
        point(4, 40.0),
        SUCCEEDED,
    ]
    for version, event in enumerate(events, 1):
        history.add(version, version * SECOND, event)
    assert list(history.curves.columns["loss"]) == [1, 2, 3, 40]
    assert history.curves.validations == {2: 2.5}
    # The first attempt from 1 s to 12 s on 2 devices, the second from 13 s to 17 s on 4.
    assert history.device_seconds(10**15, 1) == 2 * 11 + 4 * 4
    assert history.version == 17


def test_steps_that_are_missing_leave_a_hole() -> None:
    found = curves([1.0, 2.0], first=5)
    found.add(point(9, 9.0))
    assert (found.first, found.last) == (5, 9)
    assert [repr(v) for v in found.columns["loss"]] == ["1.0", "2.0", "nan", "nan", "9.0"]
    assert found.lowest("loss") == (5, 1.0)


@given(st.lists(st.floats(width=32), min_size=1, max_size=300), st.integers(1, 20), st.integers(1, 30))
def test_buckets_lose_no_step_and_no_extreme(losses: list[float], first: int, count: int) -> None:
    found = curves(losses, first)
    buckets = list(thin(found, "loss", width_for([found, Curves()], count)))
    assert len(buckets) <= count + (first > 1)
    assert [n for b in buckets for n in range(b.first, b.last + 1)] == list(range(first, found.last + 1))
    finite = [v for v in losses if math.isfinite(v)]
    assert max((b.high for b in buckets if b.high is not None), default=None) == max(finite, default=None)
    assert min((b.low for b in buckets if b.low is not None), default=None) == min(finite, default=None)
    assert sum(b.odd for b in buckets) == len(losses) - len(finite)


def test_curves_part_where_a_bit_is_another_and_where_rounding_does_not_explain_it() -> None:
    length = 10_000
    rng = random.Random(0)
    base = [rng.random() + 1 for _ in range(length)]
    other = list(base)
    other[6000] = math.nextafter(base[6000], 2)
    other[8000] = base[8000] * 1.01
    found = part(curves(base), curves(other[:9000]), "b", {"float32"})
    assert (found.first, found.last, found.steps) == (1, 9000, 9000)
    assert found.bits == {"loss": 6001}
    assert (found.at, found.beyond_rounding) == (6001, 8001)
    # In bfloat16 one percent is rounding.
    assert part(curves(base), curves(other), "b", {"float32", "bfloat16"}).beyond_rounding is None


def test_what_is_the_same_does_not_part() -> None:
    odd = [math.nan, math.inf, -0.0, 1.0]
    assert part(curves(odd), curves(odd), "b", {"float32"}).bits == {}
    assert part(curves([-0.0]), curves([0.0]), "b", {"float32"}).bits == {"loss": 1}
    # NaN where the other has a number is no rounding.
    assert part(curves([math.nan]), curves([1.0]), "b", set()).beyond_rounding == 1


def test_runs_without_a_common_step_are_not_compared() -> None:
    for one, other in (([], []), ([1.0], [])):
        assert part(curves(one), curves(other), "b", set()).steps == 0
    apart = part(curves([1.0]), curves([1.0], first=5), "b", set())
    assert (apart.steps, apart.at) == (0, None)


def test_other_rows_and_rates_are_told_before_what_they_lead_to() -> None:
    found = part(curves([1.0, 1.0]), curves([1.0, 2.0], lr=2e-4, samples_digest="f" * 64), "b", set())
    assert found.bits == {"samples": 1, "lr": 1, "loss": 2}
    assert list(found.bits) == ["samples", "lr", "loss"]


def bucketed(losses: list[float]) -> list[Bucket]:
    return list(thin(curves(losses), "loss", 1))


def drawn(series: list[Series], width: int = 80, **options: bool) -> list[str]:
    return [line.plain for line in plot(series, width, 10, **options)]


def test_a_plot_fits_and_names_each_curve() -> None:
    falling = [3 * math.exp(-n / 50) for n in range(200)]
    for width in (20, 80, 140):
        lines = drawn([Series("A", bucketed(falling)), Series("B", bucketed(falling))], width)
        assert max(map(len, lines)) <= width
        # The two are one line, and both letters are on it.
        assert {"A", "B"} <= set("".join(lines))
    plain = "".join(drawn([Series("A", bucketed(falling))], plain=True))
    assert plain.isascii()
    spiked = drawn([Series("A", bucketed([*[2.0 - n / 99 for n in range(99)], 500.0, 1.0, 1.0]))], plain=True)
    assert "beyond the top" in spiked[-1]
    assert "".join(spiked).isascii()
    # Two characters mark the 27th run and those after it.
    many = [Series(letter(n), bucketed([x + n / 9 for x in falling])) for n in range(30)]
    for width in (20, 80):
        assert max(map(len, drawn(many, width))) <= width


def test_one_spike_does_not_make_a_line_of_the_curve() -> None:
    losses = [2.0 - n / 200 + 0.01 * (n % 3) for n in range(200)]
    scale = scale_of([bucketed([*losses[:100], 500.0, *losses[100:]])])
    assert scale.high < 3
    assert scale.highest == 500.0
    assert "up to 500" in drawn([Series("A", bucketed([*losses[:100], 500.0, *losses[100:]]))])[-1]
    # A curve that falls far and stays flat is no row of spikes.
    steep = [10 * math.exp(-n / 5) for n in range(200)]
    assert scale_of([bucketed(steep)]).high == 10.0


def test_plots_of_little_are_plots() -> None:
    assert drawn([Series("A", [])]) == ["no step has a finite loss yet"]
    assert drawn([Series("A", bucketed([math.nan]))]) == ["no step has a finite loss yet"]
    assert any("A" in line for line in drawn([Series("A", bucketed([1.0]))]))
    assert any("A" in line for line in drawn([Series("A", bucketed([1.0, math.inf, 2.0]))], log=True))
    assert drawn([Series("A", bucketed([-1.0, 2.0]))], log=True), "there is no logarithm of it"


def test_a_sparkline_shows_the_last_values() -> None:
    assert sparkline([5.0, 0.0, 7.0, math.nan, 3.5], 4) == "▁█×▅"
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert sparkline([math.inf], 10) == "×"


def test_buckets_are_as_wide_as_their_number_needs() -> None:
    def width(first: int, last: int, count: int) -> int:
        return width_for([curves([1.0] * (last - first + 1), first)], count)

    assert [width(1, 100, n) for n in (10, 9, 100, 101, 1)] == [10, 12, 1, 1, 100]
    assert width(51, 100, 10) == 5
    assert width_for([], 10) == 1
    assert width_for([Curves(), curves([1.0] * 5, 3), curves([1.0] * 5, 9)], 1) == 11
