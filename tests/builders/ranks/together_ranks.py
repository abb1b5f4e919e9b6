"""Run by torchrun: trains several attempts of one rank one after the other, each in a session of its own.

Starting a process costs more on a GPU machine than training a tiny model. (Two ranks would not find each other again.)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sftd.trainer.runtime import process

process.prepare()

from sftd.trainer.loop.attempt import RankAttempt  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.runtime.reporter import Reporter  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402


def main(path: str) -> None:
    paths = json.loads(Path(path, "attempts.json").read_text())
    for attempt in map(AttemptDir, paths):
        order = attempt.order()
        session = sessions.start(order.spec)
        reporter = Reporter(attempt, session.layout.reports)
        RankAttempt(attempt, order, session, reporter, time.perf_counter()).run()
        reporter.close()
        sessions.close()


if __name__ == "__main__":
    main(sys.argv[1])
