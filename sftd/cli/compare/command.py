"""`sftd compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.compare.words import figure_texts, letter, parting_lines, shown_values
from sftd.cli.terminal import output
from sftd.cli.terminal.plot import Series, colour, plot
from sftd.cli.terminal.types import FiniteRange

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sftd.operations.queries.compare import Compared

# Width of a run's column. Runs that do not fit get another table.
_COLUMN = 24
_HEIGHT = 16
# Points of a curve in JSON and on a page.
_POINTS = 500


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN|SWEEP [RUN|SWEEP]...")
@click.option("--log", "is_log", is_flag=True, help="Plot the loss on a logarithmic scale.")
@click.option("--html", "page", type=click.Path(dir_okay=False), help="Write a page with plots to this file.")
@click.option(
    "--price",
    type=FiniteRange(min=0),
    help="Price of a device per hour; SFTD_DEVICE_PRICE if not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything, curves included, as JSON.")
def compare_command(
    runs: tuple[str, ...], is_log: bool, page: str | None, price: float | None, as_json: bool
) -> None:
    """Compare runs: settings and results.

    Shows results and costs, the settings that differ, the step at which the curves part, and the losses in one plot. All runs
    are compared with the first. A fork's curve begins with its parent's. Runs may train meanwhile. A sweep means all its runs.

    \b
    Example:
      sftd compare brave-otter calm-fox
      sftd compare sweep-3aea38
      sftd compare brave calm eager --html compare.html
      sftd compare brave calm --json | jq '.partings[0].bits.loss'
    """
    from sftd.domain.errors import Problem, Refused
    from sftd.operations.queries import compare

    settings = app.read_settings()
    store = app.open_store(settings)
    run_ids = app.resolve_runs(store, runs)
    if len(run_ids) < 2:
        fix = "name two runs or more, or a sweep"
        raise Refused(Problem("RUN", f"{runs[0]} is only one run", fix))
    if page is not None:
        output.require_folder("--html", page)
    found = compare.compare(
        store, run_ids, app.context().now(), settings.device_price if price is None else price
    )
    if page is not None:
        from sftd.cli.compare.page import render

        Path(page).write_text(render(found, _POINTS, is_log=is_log), encoding="utf-8")
    if as_json:
        click.echo(output.json_line(_json(found)))
    elif page is not None:
        click.echo(page)
    else:
        _print(found, output.console(), is_log)


def _json(found: Compared) -> dict[str, Any]:
    import msgspec

    from sftd.domain.compare.curves import thin, width_for

    width = width_for([side.curves for side in found.sides], _POINTS)
    return {
        "runs": [
            msgspec.structs.asdict(side.figures) | {"seconds": side.ledger.as_json()} for side in found.sides
        ],
        "differences": msgspec.to_builtins(found.differences),
        "partings": [
            msgspec.structs.asdict(p) | {"at": p.at, "beyond_rounding": p.beyond_rounding}
            for p in found.partings
        ],
        "curves": {
            "steps_per_point": width,
            "runs": {
                side.run.run_id: {
                    "loss": msgspec.to_builtins(list(thin(side.curves, "loss", width))),
                    "validation": [
                        {"step": step, "loss": loss} for step, loss in sorted(side.curves.validations.items())
                    ],
                }
                for side in found.sides
            },
        },
    }


def _print(found: Compared, out: Console, is_log: bool) -> None:
    from rich.text import Text

    from sftd.domain.compare.curves import thin, width_for

    width = output.width()
    fitting = max(2, (width - 18) // _COLUMN)
    for start in range(0, len(found.sides), fitting):
        out.print(_facts_table(found, range(start, min(start + fitting, len(found.sides)))))
        out.print()
    out.print(Text("What differs", "bold"))
    out.print(_differences_table(found) if found.differences else "  nothing that the logs record")
    out.print()
    out.print(Text("Where the curves part", "bold"))
    for number, parting in enumerate(found.partings, 1):
        for line in parting_lines(parting, letter(0), letter(number)):
            out.print(f"  {line}", markup=False)
    out.print()
    out.print(Text("Loss over steps", "bold"))
    # Two points a column: a braille cell is two dots wide.
    steps = width_for([side.curves for side in found.sides], 2 * max(10, width - 10))
    series = [Series(letter(n), list(thin(side.curves, "loss", steps))) for n, side in enumerate(found.sides)]
    plain = "utf" not in (out.encoding or "").lower()
    for text in plot(series, width, _HEIGHT, log=is_log, plain=plain):
        out.print(text, no_wrap=True, overflow="crop")
    legend = Text(" " * 10)
    for n, side in enumerate(found.sides):
        odd = sum(b.odd for b in series[n].buckets)
        legend.append(f"{letter(n)} {side.run.run_id}", f"bold {colour(n)}")
        legend.append(f" ({odd} not finite)  " if odd else "  ", "red")
    out.print(legend)


def _facts_table(found: Compared, numbers: range) -> Table:
    from rich.text import Text

    table = output.table("", dim=[""])
    for n in numbers:
        table.add_column(
            Text(f"{letter(n)} {found.sides[n].run.run_id}", f"bold {colour(n)}"), overflow="fold"
        )
    columns = [figure_texts(found.sides[n].figures) for n in numbers]
    for cells in zip(*columns, strict=True):
        name = cells[0][0]
        if any(value for _, value in cells):
            style = output.STATUS_STYLE if name == "status" else {}
            table.add_row(name, *(Text(value, style.get(value, "")) for _, value in cells))
    return table


def _differences_table(found: Compared) -> Table:
    from rich.text import Text

    table = output.table("", dim=[""])
    table.add_column("", overflow="fold")
    for n in range(len(found.sides)):
        table.add_column(Text(letter(n), f"bold {colour(n)}"), overflow="fold")
    for d in found.differences:
        style = "dim" if d.keeps_steps else ""
        table.add_row(d.group, Text(d.key, style), *(Text(v, style) for v in shown_values(d)))
    if any(d.keeps_steps for d in found.differences):
        table.caption = "dim: leaves the steps as they are, bit for bit or to within rounding"
        table.caption_justify = "left"
    return table
