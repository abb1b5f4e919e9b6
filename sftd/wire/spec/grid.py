"""Sweeps: make and judge one spec for each combination of `--grid key=a,b` options."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sftd.domain.errors import Problem, Refused, shorten
from sftd.domain.spec.rules import LONGEST_NAME
from sftd.domain.spec.spec import Spec
from sftd.domain.submit.facts import NOTHING, SubmitFacts
from sftd.wire.data import dataset
from sftd.wire.preflight import Preflight, inspect
from sftd.wire.spec import file as spec_file
from sftd.wire.spec.yaml_text import load_value

# A comma inside brackets or quotes does not separate values.
_VALUE = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")
_MOST = 1000


class GridPoint(msgspec.Struct, frozen=True):
    """One combination of a sweep's values, with its checked spec."""

    values: dict[str, Any]
    spec: Spec
    found: Preflight
    warnings: list[Problem]


def parse_grid(options: Sequence[str]) -> dict[str, list[str]]:
    """`["optimizer.lr=1e-5,2e-5"]` → `{"optimizer.lr": ["1e-5", "2e-5"]}`. A comma inside brackets or quotes belongs to its
    value. Raises `Refused`."""
    grid: dict[str, list[str]] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip()
        parts = _VALUE.findall(text)
        values = [v.strip() for v in parts]
        # The joined values must equal the text; otherwise a value between two commas is empty.
        if not equals or not key or not all(values) or not values or ",".join(parts) != text:
            fix = "write for example --grid optimizer.lr=1e-5,2e-5"
            raise Refused(Problem(f"--grid {shorten(option)}", "is not of the form key=value,value", fix))
        if key in grid:
            raise Refused(
                Problem(
                    f"--grid {shorten(option)}",
                    f"{shorten(key)} is given twice",
                    "give all its values in one",
                )
            )
        if len(set(values)) < len(values):
            raise Refused(Problem(f"--grid {shorten(option)}", "gives a value twice", "give each value once"))
        grid[key] = values
    return grid


def points(
    path: str | None,
    overrides: Sequence[str],
    grid: dict[str, list[str]],
    base: str,
    name: str,
    home: Path,
    known: SubmitFacts = NOTHING,
) -> list[GridPoint]:
    """Every combination of the grid, applied to the config; the last key changes fastest. The name of a point is its values, then
    `name`. `known`, `home`: see `inspect`. Raises `Refused` with the problems of all points, each once."""
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > _MOST:
        what = f"has {count} combinations, more than {_MOST}"
        raise Refused(Problem("--grid", what, "sweep over fewer values at a time"))
    # Read once for all points: standard input cannot be read twice.
    tree, beside = spec_file.load_file(path) if path is not None else {}, spec_file.beside_of(path)
    already_read: dict[bytes, Any] = {}

    def remembered(*arguments: Any, **named: Any) -> Any:
        # All points share their data files, which may be large.
        key = msgspec.json.encode([arguments, named])
        if key not in already_read:
            already_read[key] = dataset.inspect(*arguments, **named)
        return already_read[key]

    made: list[GridPoint] = []
    problems: list[Problem] = []
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        try:
            arguments = [*overrides, *(f"{k}={v}" for k, v in chosen.items())]
            spec, warnings = spec_file.read_tree(tree, arguments, base, beside)
            spec = _named(spec, name, chosen)
            found = inspect(spec, read=remembered, known=known, home=home)
        except Refused as refused:
            problems += [p for p in refused.problems if p not in problems]
            continue
        meant = {key: load_value(value, key) for key, value in chosen.items()}
        made.append(GridPoint(meant, spec, found, [*warnings, *found.warnings]))
    if problems:
        raise Refused(problems)
    return made


def _named(spec: Spec, name: str, chosen: dict[str, str]) -> Spec:
    """The spec with a name that identifies the point. The values come first, because tables truncate names at the end."""
    first = spec.trainer.experiment_name or name
    parts = (f"{key.rpartition('.')[2]} {value.rpartition('/')[2]}" for key, value in chosen.items())
    text = "".join(c if c.isprintable() else "_" for c in " ".join((*parts, first)))[:LONGEST_NAME]
    return msgspec.structs.replace(
        spec, trainer=msgspec.structs.replace(spec.trainer, experiment_name=text.strip())
    )
