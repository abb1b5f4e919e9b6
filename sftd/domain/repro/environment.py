"""The environment of an attempt (`ModelLoaded.environment`), and which of its parts affect the numbers.

Resume, `sftd verify` and `sftd compare` share this rule.
"""

from __future__ import annotations

from typing import Any

# Parts that do not affect the numbers of a step. OMP_NUM_THREADS is here because the number of threads is a separate part.
_INDIFFERENT = ("python", "transformers", "OMP_NUM_THREADS")


def environment_differences(log: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Differing key → [the log's value, the current value]. A key that only one of the two has is left out."""
    found: dict[str, list[Any]] = {}
    for key in log.keys() & now.keys():
        a, b = log[key], now[key]
        if isinstance(a, dict) and isinstance(b, dict):
            # A missing part is an unset variable, or a size that an older sftd did not record.
            inner = {part: [a.get(part), b.get(part)] for part in a.keys() | b.keys()}
            found |= {f"{key}.{part}": pair for part, pair in inner.items() if pair[0] != pair[1]}
        elif a != b:
            found[key] = [a, b]
    return dict(sorted(found.items()))


def decides_numbers(key: str) -> bool:
    """Whether a difference in this part of the environment can change a step's numbers."""
    return key not in _INDIFFERENT


def gives_same_numbers(log: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether steps computed in both environments must match bit for bit."""
    return not any(map(decides_numbers, environment_differences(log, now)))
