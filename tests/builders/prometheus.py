"""A strict reader of Prometheus' text format (version 0.0.4): it takes nothing that the format does not promise."""

from __future__ import annotations

import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
_HELP = re.compile(rf"# HELP ({_NAME}) ((?:[^\\\n]|\\\\|\\n)*)")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (gauge|counter|untyped)")
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? ([^ ]+)")
_VALUE = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]Inf|NaN")
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
Labels = tuple[tuple[str, str], ...]


def parse(text: str) -> dict[str, dict[Labels, float]]:
    """Name → labels → value. Raises `ValueError` with the line that is wrong."""
    if not text.endswith("\n"):
        raise ValueError("the last line has no end")
    found: dict[str, dict[Labels, float]] = {}
    helped, family = "", ""
    for line in text[:-1].split("\n"):
        if match := _HELP.fullmatch(line):
            helped = match[1]
            if helped in found:
                raise ValueError(f"a second family of this name: {line}")
        elif match := _TYPE.fullmatch(line):
            family = match[1]
            if family != helped:
                raise ValueError(f"no HELP before: {line}")
            found[family] = {}
        elif match := _SAMPLE.fullmatch(line):
            name, inside, value = match.groups()
            if name != family or not _VALUE.fullmatch(value):
                raise ValueError(f"outside its family, or no value: {line}")
            pairs = re.findall(rf"(?:^|,)({_LABEL})", inside or "")
            labels = tuple(sorted(_label(pair) for pair in pairs))
            if labels in found[family] or len(dict(labels)) != len(labels):
                raise ValueError(f"given twice: {line}")
            found[family][labels] = float(value)
        else:
            raise ValueError(f"no line of the format: {line!r}")
    return found


def _label(pair: str) -> tuple[str, str]:
    name, _, quoted = pair.partition("=")
    return name, re.sub(r'\\[\\"n]', lambda match: _ESCAPES[match[0]], quoted[1:-1])
