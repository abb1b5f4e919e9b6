"""Read spec files: YAML, `key=value` overrides, absolute paths."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sftd.domain.errors import Problem, Refused, shorten
from sftd.domain.spec import parse as spec_parse
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from sftd.wire.spec.paths import resolve
from sftd.wire.spec.yaml_text import load_value, load_yaml

# As the path of a config: read standard input.
STDIN = "-"


def load_file(path: str) -> dict[str, Any]:
    """Read a spec file, or standard input (`STDIN`). Raises `Refused`."""
    try:
        raw = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        what = f"cannot be read: {reason}"
        raise Refused(Problem(shorten(path), what, "give the path of a YAML file")) from None
    name = "standard input" if path == STDIN else path
    tree = load_yaml(text, name)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise Refused(Problem(name, "is not a mapping of sections", "begin with `model:`, `data:`, …"))
    return tree


def parse_overrides(arguments: Iterable[str]) -> list[tuple[str, Any]]:
    """`["optimizer.lr=1e-5", …]` → `[("optimizer.lr", 1e-05), …]`. Raises `Refused`."""
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            what = "is not of the form key=value"
            raise Refused(Problem(shorten(argument), what, "write for example optimizer.lr=1e-5"))
        overrides.append((key.strip(), load_value(value, argument)))
    return overrides


def read(path: str | None, arguments: Iterable[str], base: str) -> tuple[Spec, list[Problem]]:
    """Read a spec file and overrides into a resolved spec; see `read_tree`. Without a file, the overrides are the whole spec."""
    tree = load_file(path) if path is not None else {}
    return read_tree(tree, arguments, base, beside_of(path))


def beside_of(path: str | None) -> str | None:
    """The folder of a spec file; None without a file."""
    return None if path in (None, STDIN) else os.path.dirname(os.path.abspath(path))


def read_tree(
    tree: Mapping[str, Any], arguments: Iterable[str], base: str, beside: str | None
) -> tuple[Spec, list[Problem]]:
    """Make a resolved spec, with absolute paths, from the contents of a file and overrides. Relative paths start at `base`;
    `beside` is the file's folder (see `paths`). Returns the spec and its warnings. Raises `Refused`."""
    spec, warnings = parse(tree, parse_overrides(arguments))
    return resolve(spec, base, beside), warnings


def change(spec: Spec, arguments: Iterable[str], base: str) -> tuple[Spec, list[Problem]]:
    """Apply `key=value` overrides to a resolved spec. Relative paths start at `base`. Returns the new spec and its warnings.
    Raises `Refused`."""
    changed, warnings = spec_parse.change(spec, parse_overrides(arguments))
    return resolve(changed, base, resolved=spec), warnings
