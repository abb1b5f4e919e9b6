"""From the rows of a step to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sftd.domain.data.rows import IGNORE_INDEX
from sftd.domain.plan.sizes import length_multiple
from sftd.domain.spec.spec import Spec
from sftd.trainer.data.packing import Planner
from sftd.trainer.data.rows import Ints, Rows, Sample
from sftd.trainer.data.sequence_layout import SequenceLayout, make_chunks
from sftd.trainer.data.sequence_shards import spans
from sftd.trainer.data.token_keys import token_keys
from sftd.trainer.data.upload import upload
from sftd.trainer.runtime.session import Layout, Session

# A sample without trained labels. It fills micro-batches, so that every rank takes part in the same collectives.
EMPTY = Sample(np.zeros(1, np.int64), np.full(1, IGNORE_INDEX, np.int64))


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward.

    tokens, labels: int64 [rows, s]; a label is the token to predict at its position, or -100. Packed: rows is 1 and the
    samples lie end to end. With context parallelism s is this rank's share of `length`. length: tokens of a row,
    padding included. places: int64 [trained], ascending indices of the trained labels in the flattened transposed labels
    (Megatron's [s, b] order). trained, real: number of this rank's tokens that enter the loss, and that are not padding.
    weights: FP32 [trained], those of the labels at `places`; None if all are 1. sources: int64 [trained], the sources of their
    rows; None if all are the first.
    """

    tokens: Tensor
    labels: Tensor
    places: Tensor
    layout: SequenceLayout
    length: int
    trained: int
    real: int
    weights: Tensor | None = None
    sources: Tensor | None = None

    @property
    def rows(self) -> int:
        """First dimension of `tokens`."""
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Batching:
    """How the samples of a global batch become this rank's micro-batches."""

    planner: Planner
    layout: Layout
    device: torch.device
    # Of the masks of dropout; None without dropout.
    dropout_seed: int | None = None

    @classmethod
    def of(cls, spec: Spec, session: Session) -> Batching:
        """The batching for a spec and its layout."""
        layout = session.layout
        planner = Planner(
            size=spec.training.micro_batch_size_per_gpu,
            tokens=spec.micro_batch_tokens,
            packed=spec.training.use_rmpad,
            one_length=layout.pp > 1,
            multiple=length_multiple(spec, session.device.type),
            # The interleaved schedule needs a multiple of PP micro-batches.
            unit=layout.dp * (layout.pp if layout.vpp > 1 else 1),
        )
        seed = spec.model.megatron.seed if spec.model.lora.dropout else None
        return cls(planner, layout, session.device, seed)

    def batches(self, rows: Rows, chosen: Ints, place: int | None = None) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch of the rows `chosen` (int64 [n]). In training, `place` is that of the first
        in the sample order.

        Every rank has the lengths of all rows, so no communication is needed. Each data-parallel rank gets a contiguous
        part of the micro-batches.
        """
        members, lengths = self.planner.plan(rows.lengths[chosen])
        each = len(members) // self.layout.dp
        mine = range(self.layout.dp_rank * each, (self.layout.dp_rank + 1) * each)
        return [
            self.make([self._sample(rows, chosen, int(i), place) for i in members[k]], int(lengths[k]))
            for k in mine
        ]

    def _sample(self, rows: Rows, chosen: Ints, index: int, place: int | None) -> Sample:
        sample = rows[int(chosen[index])]
        if place is None or self.dropout_seed is None:
            return sample
        return replace(sample, keys=token_keys(self.dropout_seed, place + index, sample.tokens.size))

    def make(self, samples: Sequence[Sample], length: int) -> MicroBatch:
        """One micro-batch of `length` from its samples, filled up with empty ones."""
        if self.planner.packed:
            return self._pack(samples or [EMPTY], length)
        return self._pad([*samples, *[EMPTY] * (self.planner.size - len(samples))], length)

    def _pad(self, samples: Sequence[Sample], length: int) -> MicroBatch:
        tokens = np.zeros((len(samples), length), np.int64)
        labels = np.full((len(samples), length), IGNORE_INDEX, np.int64)
        is_real = np.zeros((len(samples), length), np.bool_)
        keys = np.zeros_like(tokens)
        for row, sample in enumerate(samples):
            tokens[row, : sample.tokens.size] = sample.tokens
            labels[row, : sample.labels.size] = sample.labels
            is_real[row, : sample.tokens.size] = sample is not EMPTY
            if sample.keys is not None:
                keys[row, : sample.keys.size] = sample.keys
        lengths = np.array([[sample.tokens.size] for sample in samples])
        return self._finish(
            samples, tokens, labels, is_real, np.arange(length), lengths.repeat(length, axis=1), None, keys
        )

    def _pack(self, samples: Sequence[Sample], length: int) -> MicroBatch:
        sizes = [s.tokens.size for s in samples]
        if padding := length - sum(sizes):
            # The padding is a separate segment, so no sample attends to it.
            sizes.append(padding)
        ends = np.cumsum([0, *sizes])
        tokens = np.zeros(length, np.int64)
        labels = np.full(length, IGNORE_INDEX, np.int64)
        is_real = np.zeros(length, np.bool_)
        keys = np.zeros_like(tokens)
        for start, sample in zip(ends, samples, strict=False):
            tokens[start : start + sample.tokens.size] = sample.tokens
            labels[start : start + sample.labels.size] = sample.labels
            is_real[start : start + sample.tokens.size] = sample is not EMPTY
            if sample.keys is not None:
                keys[start : start + sample.keys.size] = sample.keys
        positions = np.concatenate([np.arange(size) for size in sizes])
        lengths = np.repeat(sizes, sizes)
        return self._finish(
            samples, tokens[None], labels[None], is_real[None], positions, lengths[None], ends, keys[None]
        )

    def _finish(
        self,
        samples: Sequence[Sample],
        tokens: Ints,
        labels: Ints,
        is_real: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
        positions: Ints,
        lengths: Ints,
        ends: Ints | None,
        keys: Ints,
    ) -> MicroBatch:
        length, cp, cp_rank = tokens.shape[1], self.layout.cp, self.layout.cp_rank
        layout = SequenceLayout(qkv_format="sbhd", is_packed=ends is not None)
        if ends is not None or cp > 1:
            layout.chunks = make_chunks(
                length,
                [0, length] if ends is None else ends.tolist(),
                rank=cp_rank,
                ranks=cp,
                device=self.device,
            )
        mine = np.concatenate([np.arange(*span) for span in spans(length, cp_rank, cp)])
        labels = labels[:, mine]
        layout.positions = upload(positions[mine], self.device)
        numbers = self._numbers(is_real, ends)
        numbers = np.ascontiguousarray(numbers[:, mine].T)
        layout.samples = upload(numbers, self.device)
        layout.sample_count = len(labels) if ends is None else len(ends) - 1
        layout.lengths = upload(np.ascontiguousarray(lengths[:, mine].T), self.device)
        if keys.any():
            layout.dropout_keys = upload(np.ascontiguousarray(keys[:, mine].T), self.device)
        # Computed on the host: on the device, the dynamic size would force a synchronization.
        places = np.flatnonzero(labels.T != IGNORE_INDEX)
        number, position = numbers.flat[places], positions[mine][places // len(labels)]
        weights = _weights(samples, number, position)
        sources = np.array([sample.source for sample in samples])
        return MicroBatch(
            tokens=upload(tokens[:, mine], self.device),
            labels=upload(labels, self.device),
            places=upload(places, self.device),
            layout=layout,
            length=length,
            trained=places.size,
            real=int(is_real[:, mine].sum()),
            weights=None if weights is None else upload(weights, self.device),
            sources=upload(sources[number], self.device) if sources.any() else None,
        )

    @staticmethod
    def _numbers(is_real: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], ends: Ints | None) -> Ints:
        """The number of each token's sample in the micro-batch, -1 of padding."""
        rows, length = is_real.shape
        if ends is None:
            numbers = np.arange(rows)[:, None].repeat(length, axis=1)
        else:
            numbers = np.repeat(np.arange(len(ends) - 1), np.diff(ends))[None]
        return np.where(is_real, numbers, -1)


def _weights(samples: Sequence[Sample], number: Ints, position: Ints) -> npt.NDArray[np.float32] | None:
    """The weights of labels, by the number of a label's sample and its position there; None if no sample has weights."""
    if all(sample.weights is None for sample in samples):
        return None
    starts = np.cumsum([0, *(sample.labels.size for sample in samples)])
    every = [np.ones(s.labels.size, np.float32) if s.weights is None else s.weights for s in samples]
    return np.concatenate(every)[starts[number] + position]
