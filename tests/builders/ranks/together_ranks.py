"""Train several attempts in one set of processes. Attempts of one rank get a session each; attempts of several ranks share the
first one's session, because the ranks cannot rendezvous twice.

Starting a process costs more on a GPU machine than training a tiny model.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from sftd.trainer.runtime import process

process.prepare()

import torch  # noqa: E402

from sftd.domain.plan.sizes import weights_dtype  # noqa: E402
from sftd.trainer.loop.attempt import RankAttempt  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.runtime.reporter import Reporter  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402


def main(path: str) -> None:
    paths = json.loads(Path(path, "attempts.json").read_text())
    is_alone, session = os.environ["WORLD_SIZE"] == "1", None
    for attempt in map(AttemptDir, paths):
        order = attempt.order()
        if session is None or is_alone:
            session = sessions.start(order.spec)
        dtype = getattr(torch, weights_dtype(order.spec, session.device.type))
        reporter = Reporter(attempt, session.layout.reports)
        RankAttempt(attempt, order, replace(session, dtype=dtype), reporter, time.perf_counter()).run()
        reporter.close()
        if is_alone:
            sessions.close()
    if not is_alone:
        sessions.close()


if __name__ == "__main__":
    main(sys.argv[1])
