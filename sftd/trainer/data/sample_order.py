"""The rows of each step: a function of the seed, the data and the step, independent of the layout and of resumes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sftd.domain.data.mixture import Mixture, MixtureStart, SourceSize
from sftd.domain.spec.spec import Spec
from sftd.trainer.data.rows import Rows
from sftd.trainer.errors import DataError

Ints = npt.NDArray[np.int64]


class SampleOrder:
    """The endless stream of the rows of one source: each epoch is a permutation of all of them. No row is dropped at the end of an
    epoch."""

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

    def row_epochs(self, position: int, count: int) -> list[int]:
        """The epoch of the row at each stream position."""
        return [self.epoch(place) for place in range(position, position + count)]

    def rows(self, position: int, count: int) -> Ints:
        """Rows at stream positions `position` … `position + count - 1`: int64 [count]."""
        return self.at(np.arange(position, position + count))

    def at(self, places: Ints) -> Ints:
        """Rows at these stream positions: int64 [n]."""
        epochs, offsets = places // self._rows, places % self._rows
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            found[of_epoch] = self._permutation(int(epoch))[offsets[of_epoch]]
        return found

    def _permute(self, epoch: int) -> Ints:
        if not self._shuffle:
            return np.arange(self._rows)
        # Sorts raw Philox words because Generator.permutation may differ between numpy versions (NEP 19).
        words = np.random.Philox(key=[self._seed, epoch]).random_raw(self._rows)
        return np.argsort(words, kind="stable")


class MixedOrder:
    """The endless stream of the rows of several sources, each with its own shuffle and epochs."""

    def __init__(self, mixture: Mixture, first_rows: list[int], *, seed: int, shuffle: bool) -> None:
        """`first_rows`: the first usable row of each source among those of all."""
        self._mixture = mixture
        self._first_rows = first_rows
        self._orders = [
            SampleOrder(rows, seed=seed ^ _number(source.name), shuffle=shuffle)
            for source, rows in zip(mixture.sources, mixture.rows, strict=True)
        ]

    def epoch(self, position: int) -> int:
        """Completed epochs of the source that has the fewest, at stream position `position`."""
        return self._mixture.epoch(position)

    def row_epochs(self, position: int, count: int) -> list[int]:
        """The epoch, in its source, of the row at each stream position."""
        return [self._orders[source].epoch(place) for source, place in self._mixture.at(position, count)]

    def rows(self, position: int, count: int) -> Ints:
        """Rows at stream positions `position` … `position + count - 1`: int64 [count]."""
        sources, places = np.array(self._mixture.at(position, count), np.int64).T
        found = np.empty_like(places)
        for source in np.unique(sources):
            is_its = sources == source
            found[is_its] = self._first_rows[source] + self._orders[source].at(places[is_its])
        return found


def _number(name: str) -> int:
    """Of 64 bits, so that sources of the same size have different shuffles."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def mixture_of(spec: Spec, rows: Rows, start: MixtureStart) -> Mixture:
    """The mixture of a spec with sources, whose files have the usable `rows`. Raises `DataError`."""
    sizes = []
    for source, (first, last) in zip(spec.data.sources, _ranges(spec, rows), strict=True):
        if first == last:
            raise DataError(f"no row of the source {source.name} has a trained label")
        sizes.append(SourceSize(last - first, int(rows.trained[first:last].sum())))
    return Mixture(spec.data, sizes, batch_size=spec.data.train_batch_size, start=start)


def order_of(spec: Spec, rows: Rows, start: MixtureStart) -> SampleOrder | MixedOrder:
    """The sample order of a run. `rows`: the usable ones of its training files. Raises `DataError`."""
    seed, shuffle = spec.model.megatron.seed, spec.data.shuffle
    if not spec.data.sources:
        return SampleOrder(len(rows), seed=seed, shuffle=shuffle)
    first_rows = [first for first, _ in _ranges(spec, rows)]
    return MixedOrder(mixture_of(spec, rows, start), first_rows, seed=seed, shuffle=shuffle)


def _ranges(spec: Spec, rows: Rows) -> list[tuple[int, int]]:
    """First and last + 1 usable row of each source."""
    files, ends = [0], [0]
    for source in spec.data.sources:
        files.append(files[-1] + len(source.files))
        ends.append(rows.file_ends[files[-1] - 1])
    return list(pairwise(ends))


def samples_digest(numbers: Ints) -> str:
    """sha256 (hex) of the global row numbers in order, as little-endian int64."""
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
