"""The config of a run as YAML that may be submitted again."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.run.state import Run
from sftd.domain.spec.spec import Spec


def as_yaml(run: Run) -> str:
    """The settings that differ from the defaults, then the defaults as a comment."""
    spec, defaults = msgspec.to_builtins(run.spec), msgspec.to_builtins(Spec())
    set_here, left = _parted(spec, defaults)
    lines = [f"# {run.run_id}, spec {run.spec_digest[:16]}. What differs from the defaults:", _dump(set_here)]
    lines += ["# The defaults:", *(f"# {line}" for line in _dump(left).splitlines())]
    return "\n".join(lines)


def _parted(spec: dict[str, Any], defaults: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values that differ from the default, values that do not), both in sections."""
    other: dict[str, Any] = {}
    same: dict[str, Any] = {}
    for key, value in spec.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            for part, found in zip((other, same), _parted(value, default), strict=True):
                if found:
                    part[key] = found
        else:
            (same if value == default else other)[key] = value
    return other, same


def _dump(value: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000).rstrip()
