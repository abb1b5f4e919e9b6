"""How much of each source of a mixture a run reads."""

from __future__ import annotations

import msgspec

from sftd.domain.data.mixture import Mixture


class SourceReading(msgspec.Struct, frozen=True):
    """A source of `rows` usable rows. `read`: the rows that some steps read of it, a row of two epochs counted twice; `share`: of
    all rows that these steps read; `epochs`: passes over the source by their end, with those of a fork's parents."""

    name: str
    rows: int
    read: int
    share: float
    epochs: float


def readings(mixture: Mixture, first: int, last: int) -> list[SourceReading]:
    """What the stream positions from `first` to before `last` read of each source, in the order of the spec."""
    before, after = mixture.cursors(first), mixture.cursors(last)
    return [
        SourceReading(
            source.name,
            rows,
            read := after[source.name] - before[source.name],
            read / max(1, last - first),
            after[source.name] / rows,
        )
        for source, rows in zip(mixture.sources, mixture.rows, strict=True)
    ]
