"""Run by torchrun from test_isolation.py: every stage's outputs for packed samples before and after one of them changed."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

from sftd.trainer.runtime import process

process.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from sftd.trainer import trainee as trainees  # noqa: E402
from sftd.trainer.data.batches import Batching, MicroBatch  # noqa: E402
from sftd.trainer.data.rows import Sample  # noqa: E402
from sftd.trainer.data.sequence_shards import spans  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402
from sftd.wire.model.folder import read_shape  # noqa: E402

# Three samples end to end and padding; the token at 7, in the second, is changed: 7 to 31 may see it. With two
# context-parallel ranks (0-9 and 30-39, 10-29) both hold part of that.
SIZES, LENGTH, CHANGED, UNTIL = (5, 27, 4), 40, 7, 32


def keep(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return output, torch.zeros((), dtype=torch.int), output


def main(path: str) -> None:
    attempt = AttemptDir(path)
    spec = attempt.order().spec
    session = sessions.start(spec)
    trainee = trainees.load(spec, read_shape(spec.model.partial_pretrain, {}), session, pretrained=True)
    trainee.train(False)
    stream = np.random.default_rng(4).integers(3, 200, sum(SIZES))
    batches = []
    for change in (0, 1):
        stream[CHANGED] += change
        samples = [Sample(tokens, tokens) for tokens in np.split(stream.copy(), np.cumsum(SIZES)[:-1])]
        batches.append(Batching.of(spec, session).make(samples, LENGTH))
    outputs: dict[Any, list[Tensor]] = {}

    def forward(batch: MicroBatch, model: Any) -> tuple[Tensor, Any]:
        output = model(batch.tokens, batch.layout.positions[None], None, packed_seq_params=batch.layout)
        # Hidden states are [s, b, h], logits [b, s, v].
        tokens_first = output if output.shape[1] == 1 else output.transpose(0, 1)
        outputs.setdefault(id(model), []).append(tokens_first.squeeze(1).clone())
        return output, partial(keep)

    with torch.no_grad():
        trainee.run(batches, forward, rows=1, length=LENGTH, forward_only=True)
    mine = np.concatenate([np.arange(*s) for s in spans(LENGTH, session.layout.cp_rank, session.layout.cp)])
    may_change = torch.from_numpy((mine >= CHANGED) & (mine < UNTIL))
    found = []
    for before, after in outputs.values():
        is_changed = (before != after).any(dim=1)
        found.append(
            {
                "neighbours_changed": int((is_changed & ~may_change).sum()),
                "own_unchanged": int((~is_changed & may_change).sum()),
            }
        )
    (attempt.path / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    sessions.close()


if __name__ == "__main__":
    main(sys.argv[1])
