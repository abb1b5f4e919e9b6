"""Run by torchrun from test_layouts.py and test_families.py: trains several attempts of one layout in one set of processes, each from the
pretrained model to its end, and leaves the gradient of those of one step beside their journal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sftd.trainer.runtime import process

process.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from sftd.trainer.loop.attempt import RankAttempt  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.runtime.megatron_edges.training import adamw_of  # noqa: E402
from sftd.trainer.runtime.reporter import Reporter  # noqa: E402
from sftd.trainer.trainee import Trainee  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402


def gradient(trainee: Trainee) -> torch.Tensor:
    """The last step's gradient of all parameters, FP32, one after the other: without model parallelism."""
    group = parallel_state.get_data_parallel_group()
    (module,) = trainee.model
    for buffer in module.buffers:
        for bucket in buffer.buckets:
            # The distributed optimizer has reduced to each rank only the part that it updates.
            shards = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    return torch.cat([parameter.main_grad.flatten() for parameter in module.parameters()])


def held(trainee: Trainee) -> dict[str, int]:
    """Elements of this rank's weights, gradients and optimizer state."""
    parameters = [p for chunk in trainee.chunks for p in chunk.parameters()]
    state = [
        tensor
        for adamw in adamw_of(trainee.optimizer)
        for values in adamw.state.values()
        for tensor in values.values()
        if tensor.dim()
    ]
    return {
        "stage": trainee.session.layout.pp_rank,
        "weights": sum(p.numel() for p in parameters),
        "gradients": sum(p.main_grad.numel() for p in parameters),
        "optimizer": sum(tensor.numel() for tensor in state),
    }


def main(path: str) -> None:
    paths = json.loads(Path(path, "attempts.json").read_text())
    session = sessions.start(AttemptDir(paths[0]).order().spec)
    for attempt in map(AttemptDir, paths):
        order = attempt.order()
        reporter = Reporter(attempt, session.layout.reports)
        training = RankAttempt(attempt, order, session, reporter, time.perf_counter())
        training.run()
        reporter.close()
        text = json.dumps(held(training._trainee))
        Path(attempt.path, f"held-{dist.get_rank()}.json").write_text(text)
        if order.planned_steps == 1:
            found = gradient(training._trainee)
            if session.layout.reports:
                torch.save(found, attempt.path / "gradient.pt")
    sessions.close()


if __name__ == "__main__":
    main(sys.argv[1])
