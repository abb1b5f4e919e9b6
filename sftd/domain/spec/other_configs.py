"""Recognise configs of other trainers, and answer them with sftd's names."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from sftd.domain.errors import Problem, shorten
from sftd.domain.spec.other_trainers import BY_NAME, TOOLS, Known

# With this number of a tool's names, a config is taken as that tool's. Fewer are taken as slips.
_ENOUGH = 4
DOCUMENT = "docs/coming-from.md"


def known(path: str) -> Known | None:
    """The row of a dotted path, or of its last part, because users put other trainers' names into sftd's sections."""
    return BY_NAME.get(path) or BY_NAME.get(path.rpartition(".")[2])


def whose(config: Mapping[Any, Any]) -> str:
    """The tools that a config may be written for, judged by its top-level names, such as "TRL" or "LLaMA-Factory or TRL". Empty
    for sftd's own configs, and if no tool matches."""
    counts = {
        tool: sum(letter in row.tools for name in config if (row := BY_NAME.get(name)))
        for letter, tool in TOOLS.items()
    }
    most = max(counts.values())
    if most < _ENOUGH or 2 * most <= len(config):
        return ""
    return " or ".join(tool for tool, count in counts.items() if count == most)


def refusal(config: Mapping[Any, Any], sections: Container[str]) -> list[Problem]:
    """The problems of a config that is written for another tool: one for each name with a counterpart, and one for each reason
    why names have none. Empty for other configs. `sections` are sftd's own."""
    tool = whose(config)
    if not tool:
        return []
    renamed: list[Problem] = []
    without: dict[str, list[str]] = {}
    for name, value in config.items():
        row = BY_NAME.get(name)
        if row is None and name not in sections:
            without.setdefault("not known", []).append(shorten(str(name)))
        elif row is None or row.harmless or row.is_neutral(value):
            continue
        elif row.here:
            renamed.append(Problem(row.name, f"write {row.answer}"))
        else:
            without.setdefault(f"no counterpart: {row.note}", []).append(row.name)
    what = f"looks like a config of {tool}; sftd has other names"
    first = Problem("this config", what, f"write the keys named below; {DOCUMENT} has all names")
    return [first, *renamed, *(Problem(", ".join(names), why) for why, names in without.items())]
