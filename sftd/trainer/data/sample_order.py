"""The rows of each step: a function of seed and step only, independent of the layout and of resumes."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class SampleOrder:
    """The endless stream of rows: each epoch is a permutation of all rows. No row is dropped at the end of an epoch."""

    def __init__(self, rows: int, *, seed: int, shuffle: bool) -> None:
        """`rows`: number of usable rows, at least 1."""
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        # A step may span two epochs.
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def epoch(self, position: int) -> int:
        """The 0-based epoch of stream position `position`."""
        return position // self._rows

    def rows(self, position: int, count: int) -> Ints:
        """Rows at stream positions `position` … `position + count - 1`: int64 [count]."""
        place = np.arange(position, position + count)
        epochs, offsets = place // self._rows, place % self._rows
        return np.concatenate([self._permutation(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    def _permute(self, epoch: int) -> Ints:
        if not self._shuffle:
            return np.arange(self._rows)
        # Sorts raw Philox words because Generator.permutation may differ between numpy versions (NEP 19).
        words = np.random.Philox(key=[self._seed, epoch]).random_raw(self._rows)
        return np.argsort(words, kind="stable")


def samples_digest(numbers: Ints) -> str:
    """sha256 (hex) of the global row numbers in order, as little-endian int64."""
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
