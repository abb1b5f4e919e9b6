"""What a step and a validation report besides their loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftd.domain.log.events import SourceFigures
from sftd.trainer.data.rows import Ints, Rows


def figures_of(
    sums: Sequence[float], rows: Rows, chosen: Ints | slice, names: Sequence[str]
) -> dict[str, Any]:
    """The fields `token_accuracy`, `entropy` and `sources` of an event.

    sums: the figures of `linear_cross_entropy` over the rows `chosen` and all ranks. names: of the sources, if there are several.
    """
    trained, weights, sources = rows.trained[chosen], rows.weights[chosen], rows.sources[chosen]
    by_source = None
    if names:
        by_source = {
            name: SourceFigures(
                rows=int(is_its.sum()),
                tokens=int(trained[is_its].sum()),
                loss=sums[2 + number] / float(weights[is_its].sum()),
            )
            for number, name in enumerate(names)
            if (is_its := sources == number).any()
        }
    tokens = int(trained.sum())
    return {"token_accuracy": sums[0] / tokens, "entropy": sums[1] / tokens, "sources": by_source}
