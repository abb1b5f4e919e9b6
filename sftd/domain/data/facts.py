"""What is known of data files: how many rows, how long, how many of them are trained."""

from __future__ import annotations

import msgspec

# Where `DataFacts.lengths` are taken: finer at the long end, which decides about padding.
LENGTH_QUANTILES = (*(i / 32 for i in range(32)), *(1 - 2**-k for k in range(6, 13)), 1.0)


class DataFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in data files. `truncated` rows are longer than the sequence length; `unusable` rows have no
    trained label within it, and `unusable_rows` numbers the first of them, from 0 over all files. Lengths are tokens.

    Of the rows that training sees, as it sees them: `seen_tokens` with Σ n² = `seen_squares`, `lengths` at
    `LENGTH_QUANTILES`, and the `stopping` ones, in which a token is trained that ends an answer (None where that token is not
    known). `remarks` are what a person should know of the files, a sentence each. Logs of older versions lack these.
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

    @property
    def usable(self) -> int:
        """Rows that training sees."""
        return self.rows - self.unusable
