"""What a row of a data set is to training: where it is cut, and which of its tokens are predicted.

A row has an id and a label for each token. The label is the token's own id where the token is trained, `IGNORE_INDEX`
elsewhere; the position before a token predicts it, so nothing predicts the first token that is kept. Padding to the length of a
batch has `IGNORE_INDEX`, too. Places are integers, or numpy arrays with an element for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IGNORE_INDEX = -100


def kept(begin: Any, end: Any, limit: int, truncation: str) -> tuple[Any, Any]:
    """From where to where training sees a row that lies from `begin` to `end`: at most `limit` tokens, the last ones with
    `truncation` "left", else the first ones."""
    cut = (end - begin - limit) * (end - begin > limit)
    return (begin + cut, end) if truncation == "left" else (begin, end - cut)


def predicted(begin: Any, end: Any) -> tuple[Any, Any]:
    """From where to where the tokens of a row, kept from `begin` to `end`, are predicted."""
    return begin + (end > begin), end


def targets(labels: Any) -> Any:
    """The labels (a list or an array) of a kept row that are predicted, in order: target i is predicted at position i."""
    begin, end = predicted(0, len(labels))
    return labels[begin:end]


def is_trained(labels: Sequence[int]) -> list[bool]:
    """Which tokens of a kept row are trained."""
    of_targets = [label != IGNORE_INDEX for label in targets(labels)]
    return [False] * (len(labels) - len(of_targets)) + of_targets
