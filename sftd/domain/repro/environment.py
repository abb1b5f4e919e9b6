"""The environment in which an attempt computes (`ModelLoaded.environment`), and which of its parts decide numbers.

One rule for a resume, `sftd verify` and `sftd compare`.
"""

from __future__ import annotations

from typing import Any

# What an environment records that leaves the numbers of a step alone. The number of threads is a part of its own.
_INDIFFERENT = ("python", "transformers", "OMP_NUM_THREADS")


def environment_differences(log: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Key → [the log's, now's], of what differs. A part that only one of the two records is not known to differ."""
    found: dict[str, list[Any]] = {}
    for key in log.keys() & now.keys():
        a, b = log[key], now[key]
        if isinstance(a, dict) and isinstance(b, dict):
            # A variable that is not set, or a size that an older sftd did not know.
            inner = {part: [a.get(part), b.get(part)] for part in a.keys() | b.keys()}
            found |= {f"{key}.{part}": pair for part, pair in inner.items() if pair[0] != pair[1]}
        elif a != b:
            found[key] = [a, b]
    return dict(sorted(found.items()))


def decides_numbers(key: str) -> bool:
    """Whether a difference in this part of the environment may change a step's numbers."""
    return key not in _INDIFFERENT


def gives_same_numbers(log: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether steps computed in both environments must match bit for bit."""
    return not any(map(decides_numbers, environment_differences(log, now)))
