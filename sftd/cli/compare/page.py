"""The page that `sftd compare --html` writes: one self-contained file that loads nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sftd.cli.compare.words import figure_texts, letter, parting_lines, shown_values
from sftd.cli.terminal.plot import number, scale_of
from sftd.domain.compare.curves import Bucket, thin, width_for

if TYPE_CHECKING:
    from sftd.operations.queries.compare import Compared, Side

# Geometry of the plots in pixels.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 300, 62, 26, 16, 28
_CHARTS = {
    "loss": "Training loss",
    "validation": "Validation loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
}


def render(found: Compared, points: int, *, is_log: bool = False) -> str:
    """The page, with at most `points` points in a curve. `is_log` applies to the training loss."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    template = resources.files("sftd.cli.compare").joinpath("page.html.jinja").read_text(encoding="utf-8")
    width = width_for([side.curves for side in found.sides], points)
    curves = {name: [_buckets(side, name, width) for side in found.sides] for name in _CHARTS}
    curves = {name: c for name, c in curves.items() if any(b.mean is not None for one in c for b in one)}
    runs = [{"letter": letter(n), "id": side.run.run_id} for n, side in enumerate(found.sides)]
    rows = zip(*(figure_texts(side.figures) for side in found.sides), strict=True)
    return environment.from_string(template).render(
        runs=runs,
        facts=[(row[0][0], [value for _, value in row]) for row in rows if any(value for _, value in row)],
        charts=[_chart(name, given, is_log=is_log and name == "loss") for name, given in curves.items()],
        partings=[
            line for n, p in enumerate(found.partings, 1) for line in parting_lines(p, letter(0), letter(n))
        ],
        differences=[(d, shown_values(d)) for d in found.differences],
        data={"runs": runs, "charts": {name: _hover(given) for name, given in curves.items()}},
        plot={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT}
        | {"top": _TOP, "bottom": _BOTTOM},
    )


def _buckets(side: Side, name: str, width: int) -> list[Bucket]:
    if name != "validation":
        return list(thin(side.curves, name, width))
    return [
        Bucket(step, step, loss, loss, loss, 0)
        if math.isfinite(loss)
        else Bucket(step, step, None, None, None, 1)
        for step, loss in sorted(side.curves.validations.items())
    ]


def _range(curves: list[list[Bucket]]) -> tuple[int, int]:
    """The first and the last step of a plot."""
    return min(b.first for curve in curves for b in curve), max(b.last for curve in curves for b in curve)


def _hover(curves: list[list[Bucket]]) -> dict[str, Any]:
    """The data that the pointer shows in a plot."""
    first, last = _range(curves)
    rows = [[(b.first, b.last, b.mean, b.low, b.high, b.odd) for b in curve] for curve in curves]
    return {"first": first, "last": last, "curves": rows}


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers from `low` to `high`, about five."""
    if high <= low:
        yield low
        return
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
    for n in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield n * step


def _chart(name: str, curves: list[list[Bucket]], *, is_log: bool) -> dict[str, Any]:
    """A plot for the template: its texts, and its marks in pixels."""
    first, last = _range(curves)
    scale = scale_of(curves)
    is_log = is_log and scale.low > 0
    place = math.log if is_log else float
    low, high = place(scale.low), place(scale.high)
    if high == low:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)

    def x(step: float) -> float:
        return round(_LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float | None) -> float:
        share = (place(value) - low) / (high - low) if value is not None and (value > 0 or not is_log) else 0
        return round(_HEIGHT - _BOTTOM - min(max(share, -0.1), 1.1) * (_HEIGHT - _TOP - _BOTTOM), 1)

    values = [math.exp(tick) if is_log else tick for tick in _ticks(low, high)]
    # No round number close to the labels of the first and the last step.
    steps = [round(t) for t in _ticks(first, last) if x(first) + 40 < x(t) < x(last) - 50]
    ends = [[b for b in curve if b.mean is not None][-1:] for curve in curves]
    return {
        "name": name,
        "title": _CHARTS[name],
        "is_log": is_log,
        "beyond": number(scale.highest) if scale.highest > scale.high else "",
        "values": [(y(value), f"{value:.4g}") for value in values],
        "steps": [(x(step), step) for step in dict.fromkeys((first, *steps, last))],
        "curves": [list(_stretches(curve, x, y, is_dotted=name == "validation")) for curve in curves],
        "ends": [[(x(b.last) + 4, y(b.mean) + 4) for b in end] for end in ends],
    }


def _stretches(
    curve: list[Bucket], x: Callable[[float], float], y: Callable[[float | None], float], *, is_dotted: bool
) -> Iterator[dict[str, Any]]:
    """The parts of a curve between its gaps, where no number is finite."""
    for is_finite, group in groupby(curve, key=lambda b: b.mean is not None):
        if not is_finite:
            continue
        found = list(group)
        at = [x((b.first + b.last) / 2) for b in found]
        line, upper, lower = (
            [(column, y(value)) for column, value in zip(at, values, strict=True)]
            for values in ([b.mean for b in found], [b.high for b in found], [b.low for b in found])
        )
        yield {
            "line": line,
            "band": [*upper, *reversed(lower)] if any(b.low != b.high for b in found) else [],
            "dots": line if is_dotted or len(found) == 1 else [],
        }
