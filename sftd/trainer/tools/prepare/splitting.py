"""Chooses the validation rows by the chat's content only, so that no chat is in both splits."""

import heapq


class SmallestKeys:
    """The smallest keys, which cover about `rows` rows. Memory is bounded by `rows`."""

    def __init__(self, rows: int) -> None:
        self._wanted = rows
        self._counts: dict[int, int] = {}
        self._heap: list[int] = []  # negated: the greatest key comes first
        self._rows = 0

    def add(self, key: bytes) -> None:
        """Count a row."""
        number = int.from_bytes(key, "big")
        if number in self._counts:
            self._counts[number] += 1
            self._rows += 1
        elif self._rows < self._wanted or number < -self._heap[0]:
            self._counts[number] = 1
            heapq.heappush(self._heap, -number)
            self._rows += 1
        # Drop the greatest key while enough rows remain. All rows of a chat share a key.
        while self._rows - self._counts[-self._heap[0]] >= self._wanted:
            self._rows -= self._counts.pop(-heapq.heappop(self._heap))

    def __contains__(self, key: bytes) -> bool:
        """Whether rows with this key are chosen."""
        return int.from_bytes(key, "big") in self._counts


def fraction(key: bytes) -> float:
    """A number in [0, 1) that depends only on the chat's content."""
    return int.from_bytes(key[:6], "big") / 2**48
