"""The loss over the whole validation set."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from sftd.domain.log.events import ValidationCompleted
from sftd.trainer.data.batches import Batching
from sftd.trainer.data.rows import Rows
from sftd.trainer.loop.figures import figures_of
from sftd.trainer.model.moe import balance
from sftd.trainer.runtime.session import Session
from sftd.trainer.trainee import Trainee


def validate(
    step: int,
    trainee: Trainee,
    rows: Rows,
    batching: Batching,
    session: Session,
    round_size: int,
    names: Sequence[str],
) -> ValidationCompleted:
    """Mean loss per trained token over all rows. No row is dropped, and the layout does not matter. names: of the sources,
    if there are several.

    The model computes rounds of at most `round_size` rows, shortest first, to reduce padding.
    """
    started = time.perf_counter()
    by_length = np.argsort(rows.lengths, kind="stable")
    sums = torch.zeros(3 + len(names), dtype=torch.float64, device=session.device)
    tokens = 0
    trainee.train(False)
    balance.count_load(trainee.chunks, session.device)
    with torch.no_grad():
        for start in range(0, len(rows), round_size):
            batches = batching.batches(rows, by_length[start : start + round_size])
            sums += trainee.losses(batches, divisor=1, forward_only=True, sources=len(names))
            tokens += sum(batch.trained for batch in batches)
    trainee.train(True)
    load = balance.take_load(trainee.chunks, trainee.shape, session.device)
    sums = torch.cat((sums, sums.new_tensor([tokens]))) * session.layout.counts
    dist.all_reduce(sums)
    loss, *figures, tokens = sums.tolist()
    return ValidationCompleted(
        step=step,
        loss=loss / float(rows.weights.sum()),
        tokens=int(tokens),
        rows=len(rows),
        seconds=time.perf_counter() - started,
        expert_load=load,
        **figures_of(figures, rows, slice(None), names),
    )
