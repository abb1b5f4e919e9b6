"""When a run has succeeded."""

from __future__ import annotations

from sftd.domain.log import events as e
from sftd.domain.run.state import CheckpointInfo, Run


def _final(run: Run) -> CheckpointInfo | None:
    """The checkpoint with which a run ends: that of its last planned step; after an early stop, the newest since then."""
    timeline = [c for c in run.checkpoints if not c.superseded]
    if run.stopped_early is None:
        return next((c for c in timeline if c.step == run.planned_steps), None)
    since = (c for c in timeline if c.step >= run.stopped_early.step)
    return max(since, key=lambda c: c.step, default=None)


def shortfall(run: Run) -> str | None:
    """What is missing for success: planned steps, counted tokens or the final checkpoint. None if nothing is missing."""
    if run.step != run.planned_steps and run.stopped_early is None:
        return f"{run.step} of {run.planned_steps} planned steps are in the log"
    if run.tokens_counted != run.tokens_reported:
        return f"the log's steps sum to {run.tokens_counted} trained tokens, but the trainer counted {run.tokens_reported}"
    if _final(run) is None:
        return "the final checkpoint was not published"
    return None


def success(run: Run) -> e.RunSucceeded:
    """The end of a run without a shortfall."""
    final, stop = _final(run), run.stopped_early
    assert final is not None
    reason = stop.reason if stop is not None and run.step < run.planned_steps else ""
    return e.RunSucceeded(
        steps=run.step, tokens=run.tokens_counted, final_checkpoint=final.path, reason=reason
    )
