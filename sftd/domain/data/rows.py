"""How training uses a row of a data set: where the row is cut, and which tokens are predicted.

A row has an id and a label for each token. The label is the token's id if the token is trained, else `IGNORE_INDEX`. Each
position predicts the next token, so nothing predicts the first kept token. Padding has `IGNORE_INDEX` too. Positions are
integers, or numpy arrays with one element per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IGNORE_INDEX = -100


def kept(begin: Any, end: Any, limit: int, truncation: str) -> tuple[Any, Any]:
    """(begin, end) of the tokens that training keeps of a row from `begin` to `end`: at most `limit` tokens, the last ones
    if `truncation` is "left", else the first ones."""
    cut = (end - begin - limit) * (end - begin > limit)
    return (begin + cut, end) if truncation == "left" else (begin, end - cut)


def predicted(begin: Any, end: Any) -> tuple[Any, Any]:
    """(begin, end) of the predicted tokens of a row whose kept tokens are `begin` to `end`."""
    return begin + (end > begin), end


def targets(labels: Any) -> Any:
    """The predicted labels of a kept row (a list or an array), in order: position i predicts target i."""
    begin, end = predicted(0, len(labels))
    return labels[begin:end]


def is_trained(labels: Sequence[int]) -> list[bool]:
    """For each token of a kept row, whether it is trained."""
    of_targets = [label != IGNORE_INDEX for label in targets(labels)]
    return [False] * (len(labels) - len(of_targets)) + of_targets
