"""From the rows of a step to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sftd.domain.spec import Spec
from sftd.trainer.attention import SequenceLayout
from sftd.trainer.data import Ints, Sample
from sftd.trainer.session import Layout, Session
from sftd.wire.dataset import IGNORE_INDEX

# A sample that trains nothing: fills up micro-batches so that every rank takes part in the same collectives.
EMPTY = Sample(np.zeros(1, np.int64), np.full(1, IGNORE_INDEX, np.int64))


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward computes.

    tokens, labels: int64 [rows, s]; a label is the token to predict at its place, or -100. Packed: rows is 1 and the
    samples lie end to end. trained, real: tokens that enter the loss, tokens that are not padding.
    """

    tokens: Tensor
    labels: Tensor
    layout: SequenceLayout
    trained: int
    real: int

    @property
    def rows(self) -> int:
        """First dimension of `tokens`."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a row with its padding."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Batching:
    """How samples become micro-batches: `size` samples each, packed or padded, of a length that `multiple` divides;
    all of a step of one length where a pipeline needs that."""

    size: int
    packed: bool
    one_length: bool
    multiple: int
    device: torch.device

    @classmethod
    def of(cls, spec: Spec, session: Session) -> Batching:
        """As the spec and the layout ask for."""
        return cls(
            size=spec.training.micro_batch_size_per_gpu,
            packed=spec.training.use_rmpad,
            one_length=session.layout.pp > 1,
            # Sequence parallelism gives each tensor-parallel rank an equal share of the sequence.
            multiple=session.layout.tp if spec.model.megatron.sequence_parallel else 1,
            device=session.device,
        )

    def lengths(self, sample_lengths: Ints) -> Ints:
        """Length of each micro-batch of a global batch whose samples have `sample_lengths`.

        Needs no communication: every rank knows the length of every row. int64 [samples / size].
        """
        groups = sample_lengths.reshape(-1, self.size)
        lengths = groups.sum(axis=1) if self.packed else groups.max(axis=1)
        lengths = -(-lengths // self.multiple) * self.multiple
        return np.full_like(lengths, lengths.max()) if self.one_length else lengths

    def make(self, samples: Sequence[Sample], length: int) -> MicroBatch:
        """One micro-batch of `length` out of its samples."""
        build = self._pack if self.packed else self._pad
        return build(samples, length)

    def _pad(self, samples: Sequence[Sample], length: int) -> MicroBatch:
        tokens = np.zeros((len(samples), length), np.int64)
        labels = np.full((len(samples), length), IGNORE_INDEX, np.int64)
        for row, sample in enumerate(samples):
            tokens[row, : sample.tokens.size] = sample.tokens
            labels[row, : sample.labels.size] = sample.labels
        return self._finish(tokens, labels, np.arange(length), None, samples)

    def _pack(self, samples: Sequence[Sample], length: int) -> MicroBatch:
        sizes = [s.tokens.size for s in samples]
        if padding := length - sum(sizes):
            # The padding is a segment of its own, which no sample sees.
            sizes.append(padding)
        ends = np.cumsum([0, *sizes])
        tokens = np.zeros(length, np.int64)
        labels = np.full(length, IGNORE_INDEX, np.int64)
        for start, sample in zip(ends, samples, strict=False):
            tokens[start : start + sample.tokens.size] = sample.tokens
            labels[start : start + sample.labels.size] = sample.labels
        positions = np.concatenate([np.arange(size) for size in sizes])
        return self._finish(tokens[None], labels[None], positions, ends, samples)

    def _finish(
        self, tokens: Ints, labels: Ints, positions: Ints, ends: Ints | None, samples: Sequence[Sample]
    ) -> MicroBatch:
        layout = SequenceLayout(
            qkv_format="sbhd",
            positions=torch.from_numpy(positions).to(self.device),
            boundaries=None if ends is None else ends.tolist(),
            cu_seqlens_q=None if ends is None else torch.from_numpy(ends).to(self.device, torch.int32),
            max_seqlen_q=None if ends is None else int(np.diff(ends).max()),
        )
        return MicroBatch(
            tokens=torch.from_numpy(tokens).to(self.device),
            labels=torch.from_numpy(labels).to(self.device),
            layout=layout,
            trained=int((labels != IGNORE_INDEX).sum()),
            real=sum(s.tokens.size for s in samples if s is not EMPTY),
        )


def share(count: int, layout: Layout) -> range:
    """The micro-batches of a global batch of `count` that this data-parallel rank computes: a contiguous part, so
    that the micro-batches themselves are the same for any data-parallel size."""
    each = count // layout.dp
    return range(layout.dp_rank * each, (layout.dp_rank + 1) * each)
