"""What a daemon does with a run of the database: it claims it, records journal lines and ends the attempt."""

from __future__ import annotations

from sftd.domain.log import events as e
from sftd.domain.run.failures import Failure
from sftd.domain.run.state import Run
from sftd.operations.driving import attempts
from sftd.operations.driving.attempts import Claimed
from sftd.store.database.engine import Store
from sftd.wire.attempt.journal import Line
from tests.builders.log.clock import Clock
from tests.builders.log.specs import LEASE


def lines(*steps: e.StepCompleted) -> list[Line]:
    return [Line(number=n, occurred_at=n, event=s) for n, s in enumerate(steps, 1)]


CRASH = Failure("killed", "boom")


def claim(log: Store, clock: Clock) -> Claimed:
    claimed = attempts.claim(
        log, clock.context, daemon="d", host="h", fits=lambda run: True, lease_micros=LEASE
    )
    assert claimed is not None
    return claimed


def end(log: Store, clock: Clock, claimed: Claimed, exit_code: int = 1) -> Run:
    return attempts.finish(
        log, clock.context, claimed.lease, exit_code=exit_code, failure=CRASH, lost=False, backoff_seconds=1.0
    )
