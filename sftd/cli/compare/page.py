"""The page that `sftd compare --html` writes: one file with everything in it, which asks the network for nothing."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING

import msgspec

from sftd.cli.compare.words import facts, letter, parting_lines, shown_values
from sftd.cli.terminal.plot import number, scale_of
from sftd.domain.compare.curves import Bucket, thin, width_for

if TYPE_CHECKING:
    from sftd.operations.queries.compare import Compared, Side

_WIDTH, _HEIGHT = 860, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 26, 16, 28
# Lines are told apart by dashes and letters, too.
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "1 4", "14 5")
_CHARTS = (
    ("loss", "Training loss"),
    ("validation", "Validation loss"),
    ("grad_norm", "Gradient norm"),
    ("lr", "Learning rate"),
)


class _Chart(msgspec.Struct, frozen=True):
    """A plot: for each run its buckets."""

    name: str
    title: str
    curves: list[list[Bucket]]


def render(found: Compared, points: int, *, is_log: bool = False) -> str:
    """The page, with at most so many points to a curve."""
    width = width_for([side.curves for side in found.sides], points)
    charts = [
        _Chart(name, title, [_buckets(side, name, width) for side in found.sides]) for name, title in _CHARTS
    ]
    charts = [c for c in charts if any(b.mean is not None for curve in c.curves for b in curve)]
    body = "\n".join(
        (
            _summary(found),
            "".join(_svg(chart, is_log=is_log and chart.name == "loss") for chart in charts)
            or "<p>No run has recorded a step yet.</p>",
            _partings(found),
            _differences(found),
        )
    )
    title = " · ".join(side.run.run_id for side in found.sides)
    page = resources.files("sftd.cli.compare").joinpath("page.html").read_text(encoding="utf-8")
    for mark, text in (("TITLE", _e(title)), ("BODY", body), ("DATA", _data(found, charts))):
        page = page.replace(f"<!--{mark}-->", text, 1)
    return page


def _e(text: object) -> str:
    return html.escape(str(text))


def _buckets(side: Side, name: str, width: int) -> list[Bucket]:
    if name != "validation":
        return list(thin(side.curves, name, width))
    return [
        Bucket(step, step, loss, loss, loss, 0)
        if math.isfinite(loss)
        else Bucket(step, step, None, None, None, 1)
        for step, loss in sorted(side.curves.validations.items())
    ]


def _data(found: Compared, charts: Sequence[_Chart]) -> str:
    """What the hover reads; `<` never stands in it, so that nothing in it can end the script."""
    data = {
        "runs": [{"letter": letter(n), "id": side.run.run_id} for n, side in enumerate(found.sides)],
        "charts": {
            chart.name: {
                "first": min(b.first for curve in chart.curves for b in curve),
                "last": max(b.last for curve in chart.curves for b in curve),
                "curves": [
                    [[b.first, b.last, b.mean, b.low, b.high, b.odd] for b in curve] for curve in chart.curves
                ],
            }
            for chart in charts
        },
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _name(n: int, run_id: str) -> str:
    dash = f' stroke-dasharray="{_DASHES[n % len(_DASHES)]}"'
    line = f'<svg class="key c{n % 6}" viewBox="0 0 30 6" aria-hidden="true"><path d="M1 3H29"{dash}/></svg>'
    return f"{line}<b>{_e(letter(n))}</b> {_e(run_id)}"


def _summary(found: Compared) -> str:
    heads = "".join(f'<th scope="col">{_name(n, s.run.run_id)}</th>' for n, s in enumerate(found.sides))
    rows = ""
    for cells in zip(*(facts(side.figures) for side in found.sides), strict=True):
        if any(value for _, value in cells):
            values = "".join(f"<td>{_e(value)}</td>" for _, value in cells)
            rows += f'<tr><th scope="row">{_e(cells[0][0])}</th>{values}</tr>'
    return f'<div class="wide"><table><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _partings(found: Compared) -> str:
    lines = [
        line
        for n, parting in enumerate(found.partings, 1)
        for line in parting_lines(parting, letter(0), letter(n))
    ]
    items = "".join(
        f'<p class="more">{_e(line.strip())}</p>' if line.startswith(" ") else f"<p>{_e(line)}</p>"
        for line in lines
    )
    return f"<h2>Where the curves part</h2>{items}"


def _differences(found: Compared) -> str:
    if not found.differences:
        return "<h2>What differs</h2><p>Nothing that the logs know of.</p>"
    heads = "".join(f'<th scope="col">{_e(letter(n))}</th>' for n in range(len(found.sides)))
    rows = ""
    for d in found.differences:
        kind = ' class="free"' if d.keeps_steps else ""
        values = "".join(f"<td>{_e(v)}</td>" for v in shown_values(d))
        rows += f'<tr{kind}><td>{_e(d.group)}</td><th scope="row">{_e(d.key)}</th>{values}</tr>'
    note = (
        "<p class=more>Pale: leaves the steps as they are, bit for bit or except for rounding.</p>"
        if any(d.keeps_steps for d in found.differences)
        else ""
    )
    head = f"<thead><tr><td></td><td></td>{heads}</tr></thead>"
    return f'<h2>What differs</h2><div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>{note}'


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


def _svg(chart: _Chart, *, is_log: bool) -> str:
    buckets = [b for curve in chart.curves for b in curve]
    first, last = min(b.first for b in buckets), max(b.last for b in buckets)
    scale = scale_of(chart.curves)
    is_log = is_log and scale.low > 0
    place = math.log if is_log else float
    low, high = place(scale.low), place(scale.high)
    if high == low:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)

    def x(step: float) -> float:
        return round(_LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        share = (place(value) - low) / (high - low) if not is_log or value > 0 else 0.0
        return round(_HEIGHT - _BOTTOM - min(max(share, -0.1), 1.1) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = []
    for tick in _ticks(low, high):
        value = math.exp(tick) if is_log else tick
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7}" y="{y(value) + 4}">{value:.4g}</text>')
    # The first and the last step are worth more than a round number beside them.
    round_steps = [round(t) for t in _ticks(first, last) if x(first) + 40 < x(t) < x(last) - 50]
    parts += [
        f'<text class="x" x="{x(step)}" y="{_HEIGHT - 8}">{step}</text>'
        for step in dict.fromkeys((first, *round_steps, last))
    ]
    parts.append(f'<g clip-path="url(#clip)">{"".join(_curves(chart, x, y))}</g>')
    ends = ((n, [b for b in curve if b.mean is not None]) for n, curve in enumerate(chart.curves))
    parts += [
        f'<text class="end c{n % 6}" x="{x(found[-1].last) + 4}" y="{y(found[-1].mean or 0) + 4}">{_e(letter(n))}</text>'
        for n, found in ends
        if found
    ]
    beyond = (
        f" <small>▲ beyond the top: up to {number(scale.highest)}</small>"
        if scale.highest > scale.high
        else ""
    )
    return (
        f"<h2>{_e(chart.title)}{' <small>(log)</small>' if is_log else ''}{beyond}</h2>"
        f'<div class="chart" data-chart="{chart.name}">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_e(chart.title)} over steps">'
        f'<clipPath id="clip"><rect x="{_LEFT}" y="{_TOP - 6}" width="{_WIDTH - _LEFT - _RIGHT + 1}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM + 12}"/></clipPath>'
        f'{"".join(parts)}<path class="cross" d=""/></svg><div class="tip" hidden></div></div>'
    )


def _curves(chart: _Chart, x: object, y: object) -> Iterator[str]:
    assert callable(x)
    assert callable(y)
    for n, curve in enumerate(chart.curves):
        # Where no number is finite, the line has a gap.
        stretch: list[Bucket] = []
        for b in [*curve, Bucket(0, 0, None, None, None, 0)]:
            if b.mean is not None:
                stretch.append(b)
                continue
            if stretch:
                middle = [(x((b.first + b.last) / 2), b) for b in stretch]
                if any(b.low != b.high for b in stretch):
                    upper = [f"{at} {y(b.high)}" for at, b in middle]
                    lower = [f"{at} {y(b.low)}" for at, b in reversed(middle)]
                    yield f'<path class="band c{n % 6}" d="M{"L".join(upper + lower)}Z"/>'
                path = "L".join(f"{at} {y(b.mean)}" for at, b in middle)
                dash = f' stroke-dasharray="{_DASHES[n % len(_DASHES)]}"'
                yield f'<path class="line c{n % 6}" d="M{path}"{dash}/>'
                if chart.name == "validation" or len(stretch) == 1:
                    dots = "".join(f'<circle cx="{at}" cy="{y(b.mean)}" r="2.6"/>' for at, b in middle)
                    yield f'<g class="dots c{n % 6}">{dots}</g>'
            stretch = []
