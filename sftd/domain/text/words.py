"""Numbers and changes formatted for users."""

from __future__ import annotations

import json
from typing import Any

from sftd.domain.text.printable import printable


def loss(value: float | str | None) -> str:
    """A loss with four decimals; a non-finite loss as its name."""
    if value is None:
        return ""
    try:
        number = float(value)
    except ValueError:
        # The view is damaged; `sftd db check` reports it.
        return "?"
    return f"{number:.4f}" if number - number == 0.0 else str(value)


def changes(changed: dict[str, Any]) -> list[str]:
    """One line for each change of a spec. `changed` maps keys to [before, after]."""

    def shown(value: Any) -> str:
        return printable(value) if isinstance(value, str) and value else json.dumps(value)

    return [f"{key}: {shown(was)} → {shown(now)}" for key, (was, now) in changed.items()]


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 row`, `2,048 rows`; `plural` is for irregular nouns."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def memory(count: float) -> str:
    """Bytes of memory as `12.3 GiB`: device memory is specified in binary units."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 * 0.95 else f"{count / 2**20:.0f} MiB"


def size(count: int) -> str:
    """Bytes on a disk as `1.6 GB`: disks are specified in decimal units. For memory use `memory`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def first_line(text: str, longest: int = 300) -> str:
    """The first line of a message, at most `longest` characters."""
    first = text.strip().partition("\n")[0]
    return first if len(first) <= longest else f"{first[:longest]}…"
