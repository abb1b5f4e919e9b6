"""Numbers as people read them."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 row`, `2,048 rows`; `plural` is for a noun that does not just take an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def memory(count: float) -> str:
    """Bytes of memory → `12.3 GiB`, the unit in which devices have it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 * 0.95 else f"{count / 2**20:.0f} MiB"


def size(count: int) -> str:
    """Bytes on a disk → `1.6 GB`, the unit in which disks are sold. Memory has its own: `memory`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
