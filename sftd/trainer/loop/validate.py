"""The loss over the whole validation set."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist

from sftd.domain.log.events import ValidationCompleted
from sftd.trainer.data.batches import Batching
from sftd.trainer.data.rows import Rows
from sftd.trainer.model.moe import balance
from sftd.trainer.runtime.session import Session
from sftd.trainer.trainee import Trainee


def validate(
    step: int, trainee: Trainee, rows: Rows, batching: Batching, session: Session, round_size: int
) -> ValidationCompleted:
    """Mean loss per trained token over all rows. No row is dropped, and the layout does not matter.

    The model computes rounds of at most `round_size` rows, shortest first, to reduce padding.
    """
    started = time.perf_counter()
    by_length = np.argsort(rows.lengths, kind="stable")
    loss = tokens = 0.0
    trainee.train(False)
    balance.count_load(trainee.chunks, session.device)
    with torch.no_grad():
        for start in range(0, len(rows), round_size):
            batches = batching.batches(rows, by_length[start : start + round_size])
            loss += float(trainee.losses(batches, divisor=1, forward_only=True))
            tokens += sum(batch.trained for batch in batches)
    trainee.train(True)
    load = balance.take_load(trainee.chunks, trainee.shape, session.device)
    sums = torch.tensor(
        [loss, tokens] if session.layout.counts else [0.0, 0.0], dtype=torch.float64, device=session.device
    )
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    return ValidationCompleted(
        step=step,
        loss=loss / tokens,
        tokens=int(tokens),
        rows=len(rows),
        seconds=time.perf_counter() - started,
        expert_load=load,
    )
