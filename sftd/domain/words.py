"""Numbers as people read them."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 row`, `2,048 rows`; `plural` is for a noun that does not just take an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
