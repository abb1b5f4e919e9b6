"""What the log says about the steps of a run, and whether it holds every journal line."""

from __future__ import annotations

from typing import Any

from sftd.wire.attempt import journal
from tests.builders.process.homes import Home


def numbers(event: dict[str, Any]) -> tuple[Any, ...]:
    """What of a step must match when it is redone."""
    p = event["payload"]
    return tuple(p[name] for name in ("loss", "grad_norm", "lr", "tokens", "tokens_total", "samples_digest"))


def timeline(home: Home, run_id: str) -> dict[int, tuple[Any, ...]]:
    """Step → numbers, as the last attempt that made the step recorded them."""
    return {e["payload"]["step"]: numbers(e) for e in home.events(run_id, "StepCompleted")}


def assert_log_holds_journals(home: Home, run_id: str) -> None:
    """Every journal line is in the log once, in order, and no more than those."""
    events = home.events(run_id)
    assert [e["version"] for e in events] == list(range(1, len(events) + 1))
    for number in range(1, home.show(run_id)["attempt"] + 1):
        lines, _ = journal.read(home.attempt(run_id, number).journal, limit=10**9)
        ingested = [e for e in events if e["attempt"] == number and e["actor"] == "trainer"]
        assert [type(line.event).__name__ for line in lines] == [e["type"] for e in ingested]
        steps = [line.event.step for line in lines if type(line.event).__name__ == "StepCompleted"]
        assert steps == [e["payload"]["step"] for e in ingested if e["type"] == "StepCompleted"]
