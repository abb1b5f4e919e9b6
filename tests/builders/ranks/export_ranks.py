"""Run by torchrun from test_export.py: publishes a checkpoint of each pretrained model as it was loaded."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

from sftd.trainer.runtime import process

process.prepare()

import torch  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from sftd.trainer import trainee as trainees  # noqa: E402
from sftd.trainer.checkpoint.checkpoints import Checkpoints, Progress  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.runtime.reporter import Reporter  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402
from sftd.wire.model.folder import read_shape  # noqa: E402


def main(path: str) -> None:
    session = sessions.start(AttemptDir(path).order().spec)
    for name in json.loads((AttemptDir(path).path / "attempts.json").read_text()):
        attempt = AttemptDir(name)
        order = attempt.order()
        reporter = Reporter(attempt, session.layout.reports)
        is_bf16 = order.spec.model.megatron.params_dtype == "bfloat16"
        session = replace(session, dtype=torch.bfloat16 if is_bf16 else torch.float32)
        shape = read_shape(order.spec.model.partial_pretrain, {})
        trainee = trainees.load(order.spec, shape, session, pretrained=True)
        checkpoints = Checkpoints(order, session, trainee, reporter)
        checkpoints.save(Progress(1, 1, math.nan, math.nan), {}, must_succeed=True)
        reporter.close()
    sessions.close()


if __name__ == "__main__":
    # As the trainer's own main module: a rank that a signal ends prints its stacks.
    record(main)(sys.argv[1])
