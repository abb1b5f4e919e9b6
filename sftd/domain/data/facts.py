"""Facts about data files: number of rows, their lengths, and how many are trained."""

from __future__ import annotations

import msgspec

# The quantiles of `DataFacts.lengths`: finer at the long end, which decides the padding.
LENGTH_QUANTILES = (*(i / 32 for i in range(32)), *(1 - 2**-k for k in range(6, 13)), 1.0)


class SourceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A source of a mixture: usable rows of its files, their trained tokens after truncation, and the digest of the files."""

    name: str
    rows: int
    tokens: int
    digest: str


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about data files. Lengths are in tokens. `truncated` rows are longer than the sequence length. `unusable` rows
    have no trained label within it; `unusable_rows` are the indices of the first few, counted from 0 over all files.

    The other fields cover rows after truncation, without unusable ones. `seen_tokens` is Σ n and `seen_squares` is Σ n² over
    row lengths n. `lengths` are their `LENGTH_QUANTILES`. `stopping` counts rows that train an end-of-answer token (None if
    that token is unknown). `remarks` are notes for the user, one sentence each. Older logs lack these fields.

    `sources` describes those of a mixture.
    """

    files: list[str]
    digest: str
    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    unusable: int
    unusable_rows: tuple[int, ...] = ()
    seen_tokens: int = 0
    seen_squares: int = 0
    lengths: tuple[int, ...] = ()
    stopping: int | None = None
    remarks: tuple[str, ...] = ()
    sources: tuple[SourceFacts, ...] = ()

    @property
    def usable(self) -> int:
        """Rows that training sees."""
        return self.rows - self.unusable
