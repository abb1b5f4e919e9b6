"""The chunks in which a recurrence over samples is computed: no chunk has tokens of two samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from sftd.trainer.data.upload import upload

# Tokens of a chunk.
CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """Tokens [n] ordered by chunks. Chunk i of all samples that have one comes before chunk i + 1 of any, longer samples first:
    step i of a recurrence is one slice of `active[i]` chunks, and the samples that it continues are the first of the step before.

    sources: int64 [chunks · CHUNK], the token at each place; n where a sample's last chunk has none. places: int64 [n], the
    place of each token.
    """

    sources: Tensor
    places: Tensor
    active: tuple[int, ...]

    def split(self, x: Tensor) -> Tensor:
        """x [n, …] → [chunks, CHUNK, …] with zeros where a sample has ended."""
        return _Gather.apply(x, self.sources, self.places).unflatten(0, (-1, CHUNK))

    def join(self, x: Tensor) -> Tensor:
        """Inverse of `split`."""
        return _Gather.apply(x.flatten(0, 1), self.places, self.sources)


@lru_cache(maxsize=4)
def chunks_of(ends: tuple[int, ...], rows: int, device: torch.device) -> Chunks:
    """The chunks of tokens [s, rows], flattened, in each of whose rows samples end at `ends` (with a leading 0).

    All layers of a micro-batch have the same.
    """
    lengths = np.repeat(np.diff(ends), rows)
    starts = (np.array(ends[:-1])[:, None] * rows + np.arange(rows)).ravel()
    count = -(-lengths // CHUNK)
    order = np.argsort(-count, kind="stable")
    active = tuple(int((count > step).sum()) for step in range(int(count.max())))
    tokens = ends[-1] * rows
    sources = np.full((sum(active), CHUNK), tokens)
    offsets = np.arange(CHUNK)
    first = 0
    for step, found in enumerate(active):
        segments = order[:found]
        inside = step * CHUNK + offsets
        places = starts[segments, None] + inside * rows
        sources[first : first + found] = np.where(inside < lengths[segments, None], places, tokens)
        first += found
    flat = sources.ravel()
    where = np.empty(tokens + 1, np.int64)
    where[flat] = np.arange(flat.size)
    return Chunks(upload(flat, device), upload(where[:tokens], device), active)


class _Gather(Function):
    """x [n, …] → x[index] with zeros at index n. `back` is the inverse: backward gathers too, so that it repeats its bits, which an
    addition by atomics does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return _rows(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        index, back = ctx.saved_tensors
        return _Gather.apply(grads[0], back, index), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, *x.shape[1:]))).index_select(0, index)
