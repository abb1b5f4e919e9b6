"""What `sftd queue` says of a run that a daemon drives."""

from __future__ import annotations

from typing import Any

import pytest

from sftd.cli.look import queue
from sftd.domain.log.events import JobReported
from sftd.operations.queries.queue import QueueRow


def job(state: str, reason: str = "") -> JobReported:
    return JobReported(job="7", state=state, reason=reason)


def line(width: int = 200, **more: Any) -> str:
    fields = {"status": "running", "job": job("RUNNING"), **more}
    row = QueueRow(
        run_id="calm-fox-0001", priority=0, devices=2, user="u", project="p", step=60, planned_steps=90,
        seconds_left=120.0, host="h", launcher="slurm", observed=True, **fields,
    )  # fmt: skip
    return list(queue._table([row], 0, width, colour=False))[-1]


@pytest.mark.parametrize(
    ("status", "report", "told"),
    [
        ("running", None, "(step 60 of 90, 2m00s left)"),
        ("running", job("RUNNING"), "(step 60 of 90, 2m00s left)"),
        ("starting", job("PENDING", "Resources"), "(Slurm: job 7 pending (Resources))"),
        (
            "running",
            job("NOT OBSERVED", "Slurm does not answer: down"),
            "(Slurm: job 7 not observed (Slurm does not answer: down); step 60 of 90, 2m00s left)",
        ),
        (
            "stopping",
            job("PENDING", "Priority; not cancelled yet: down"),
            "(Slurm: job 7 pending (Priority; not cancelled yet: down); step 60 of 90, 2m00s left)",
        ),
    ],
)
def test_a_job_is_told_of_unless_it_just_runs(status: str, report: JobReported | None, told: str) -> None:
    assert line(status=status, job=report).endswith(told)


def test_on_a_narrow_screen_the_state_comes_before_the_steps() -> None:
    narrow = line(80, job=job("NOT OBSERVED", "Slurm does not answer: down"))
    assert len(narrow) <= 80
    assert "not observed" in narrow
