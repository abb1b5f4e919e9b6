"""The folder of a direct run, written without a trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftd.domain.log import events as e
from sftd.domain.spec.spec import Spec
from sftd.operations.commands import import_run
from sftd.store.database.engine import Store
from sftd.wire.attempt.direct_run import DirectRun, DirectSubmission
from sftd.wire.attempt.directory import Order, ProcessFile
from sftd.wire.attempt.journal import JournalWriter
from sftd.wire.preflight import Preflight, submission
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import SECOND
from tests.builders.log.specs import FACTS, SHAPE, SPEC

RUN = "brave-otter-3f2a"


class Folder:
    """A direct run of three steps, written as the trainer writes it."""

    def __init__(self, path: Path, spec: Spec = SPEC) -> None:
        self.run = DirectRun(path)
        path.mkdir()
        self.spec = spec
        event = submission(spec, Preflight(SHAPE, FACTS, None, 3, []), [], "ada")
        self.run.write_submission(DirectSubmission.of(RUN, SECOND, event))

    def published(self, number: int) -> e.CheckpointPublished:
        path = self.run.checkpoint_dir / f"step-{number:08d}"
        path.mkdir(parents=True, exist_ok=True)
        return e.CheckpointPublished(
            step=number, path=str(path), bytes=7, manifest_digest=f"m{number}", seconds=0.1
        )

    def attempt(
        self, *lines: e.Event, resumed: int | None = None, exit_code: int | None = None, **left: Any
    ) -> None:
        """The next attempt: its journal and how it ended (`stop`: on request; `error`: what a rank raised)."""
        number = self.run.attempts() + 1
        directory = self.run.attempt(number)
        checkpoint = str(self.run.checkpoint_dir / f"step-{resumed:08d}") if resumed else None
        directory.create(
            Order(
                run_id=RUN,
                attempt=number,
                token="t",
                spec=self.spec,
                planned_steps=3,
                checkpoint_dir=str(self.run.checkpoint_dir),
                checkpoint=checkpoint,
            )
        )
        directory.write_process(
            ProcessFile(
                pid=4711,
                create_time=1.5,
                host="node1",
                devices=["cpu:0"],
                argv=["torchrun"],
                started_at=10 * number * SECOND,
            )
        )
        writer = JournalWriter(directory.journal)
        if checkpoint:
            writer.append(
                e.TrainingResumed(step=resumed or 0, path=checkpoint, tokens_total=10 * (resumed or 0))
            )
        for i, event in enumerate(lines, 1):
            writer.append(event, (10 * number + i) * SECOND)
        writer.close()
        if left.get("stop"):
            directory.request_stop()
        if error := left.get("error"):
            message = {"message": error, "extraInfo": {"py_callstack": "", "timestamp": "1"}}
            directory.write_rank_error(0, json.dumps({"message": message}))
        if exit_code is not None:
            directory.write_exit_code(exit_code)


def take_in(log: Store, folder: Folder) -> import_run.Imported:
    return import_run.take_in(log, CONTEXT, str(folder.run.path))
