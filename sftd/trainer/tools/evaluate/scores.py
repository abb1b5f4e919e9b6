"""Scores of answers, and their means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence


def is_right(metric: str, answer: str, references: list[str]) -> bool:
    """Whether the answer scores 1, see `ask.ask`."""
    if metric == "exact_match":
        return " ".join(answer.split()) in [" ".join(reference.split()) for reference in references]
    if metric == "regex":
        return any(re.search(pattern, answer) for pattern in references)
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    # NaN and Infinity are no JSON.
    raise ValueError(constant)


def mean(name: str, scores: Sequence[float]) -> dict[str, float]:
    """The mean of scores of 0 or 1, and of several its standard error √(p · (1 − p) / (n − 1)), as metrics."""
    count = len(scores)
    p = sum(scores) / count
    return {name: p} | ({f"{name}_stderr": math.sqrt(p * (1 - p) / (count - 1))} if count > 1 else {})
