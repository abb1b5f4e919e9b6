"""Recorded steps, trained again in a folder of their own: the same torchrun, another journal, nothing that stays."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sftd.domain.errors import SftdError
from sftd.domain.events import Event
from sftd.domain.failures import classify
from sftd.launcher.inventory import Need
from sftd.launcher.local import LocalAttempt
from sftd.wire import journal
from sftd.wire.attempt_dir import AttemptDir, Order, make_private

_POLL_SECONDS = 0.1


class RerunFailed(SftdError):
    """The steps could not be trained again."""


@contextlib.contextmanager
def rerun(
    order: Order, need: Need, devices: list[str], parent: Path, *, keep: bool = False
) -> Iterator[Rerun]:
    """Start what `order` says in a new folder under `parent`; `order.last_step` says where it ends. At the end of the
    block, however it comes, its processes are gone, and so is the folder unless `keep`."""
    make_private(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{order.run_id}-", dir=parent))
    directory = AttemptDir(folder / "attempt")
    order = msgspec.structs.replace(
        order, token=str(uuid.uuid4()), checkpoint_dir=str(folder / "checkpoints")
    )
    attempt = None
    try:
        attempt, _ = LocalAttempt.start(directory, order, need, devices)
        yield Rerun(attempt)
    finally:
        if attempt is not None:
            attempt.kill()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                parent.rmdir()


class Rerun:
    """Training in a scratch folder."""

    def __init__(self, attempt: LocalAttempt) -> None:
        self._attempt = attempt

    @property
    def folder(self) -> Path:
        """Where it happens."""
        return self._attempt.directory.path

    def events(self) -> Iterator[Event]:
        """What the trainer tells, as it comes. Raises `RerunFailed` when it ends with anything but success."""
        offset, number = 0, 1
        while True:
            # Asked first: what is written before the end is then read by this round.
            alive = self._attempt.is_alive()
            lines, offset = journal.read(self._attempt.directory.journal, offset, number)
            number += len(lines)
            yield from (line.event for line in lines)
            if lines:
                continue
            if not alive:
                break
            time.sleep(_POLL_SECONDS)
        remains = self._attempt.remains()
        if remains.exit_code != 0:
            failure = classify(remains)
            # What the message says in full would only be said again, once for each rank and line of the traceback.
            is_plain = failure.cause in ("user error", "bad checkpoint")
            raise RerunFailed(
                f"The steps could not be trained again: {failure.cause}: {failure.message}"
                + "".join(f"\n    {line}" for line in ([] if is_plain else failure.evidence))
            )
