"""`sftd config --json` against a spec that nobody has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from click.testing import CliRunner

from sftd.cli import main
from sftd.domain.spec.spec import Spec


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested sections with its value; an empty mapping is a value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value


def test_every_key_is_listed_once_with_its_own_default() -> None:
    rows = json.loads(CliRunner().invoke(main, ["config", "--json"]).stdout)
    assert [(row["key"], row["default"]) for row in rows] == list(leaves(msgspec.to_builtins(Spec())))
    kinds = {bool: "bool", int: "int", float: "float", list: "list of", dict: "mapping"}
    for row in rows:
        assert row["meaning"], row["key"]
        if (kind := kinds.get(type(row["default"]))) is not None:
            # A whole number may be the default of a float.
            assert row["type"].startswith((kind, "float") if kind == "int" else kind), row["key"]
