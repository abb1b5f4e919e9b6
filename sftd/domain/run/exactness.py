"""Whether a recomputed step must match the log bit for bit (`Run.is_exact`), and the comparison.

The log's steps up to `Run.loose_until` may come from another environment than the last attempt's, or depend on such steps.
An attempt that begins before `loose_until` compares to within rounding. Once it has recomputed all of these steps,
`loose_until` moves back to the step where the attempt began.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sftd.domain.log import events as e
from sftd.domain.repro.environment import gives_same_numbers
from sftd.domain.repro.steps import Redone, compare
from sftd.domain.run.state import Run


def compare_with_log(log: Mapping[int, e.StepCompleted], run: Run, event: e.Event) -> Redone | None:
    """Compare a step that the run's last attempt recomputed. `log` holds the records that it must reproduce (see
    `steps_to_redo`), `run` is the state after the attempt's `ModelLoaded`. None for a new step or another event."""
    was = log.get(event.step) if isinstance(event, e.StepCompleted) else None
    if was is None or not isinstance(event, e.StepCompleted):
        return None
    return compare(was, event, is_exact=run.is_exact, dtype=run.dtype)


def at_load(run: Run, loaded: e.ModelLoaded) -> Run:
    """The run after an attempt has loaded its model."""
    loose = run.loose_until
    # A state from before `loose_until` existed has only `is_exact`: false means that some environment differed.
    has_changed = not gives_same_numbers(run.environment, loaded.environment) or (
        loose is None and not run.is_exact
    )
    # The new steps depend on other numbers than the log's.
    if has_changed or (loose is not None and run.step < loose):
        loose = run.highest_step
    return msgspec.structs.replace(
        run,
        is_exact=loaded.is_deterministic and run.step >= (loose or 0),
        loose_until=loose,
        began_at=run.step,
        environment=loaded.environment,
    )


def at_claim(run: Run, from_step: int) -> int | None:
    """`loose_until` after the claim of an attempt from the checkpoint of `from_step`."""
    is_superseded = any(c.superseded for c in run.checkpoints if c.step == from_step)
    # If the environment has changed, the log's later steps may not depend on this checkpoint.
    return run.highest_step if is_superseded and run.loose_until is not None else run.loose_until


def at_step(run: Run, step: int) -> int | None:
    """`loose_until` after `step`."""
    loose = run.loose_until
    return run.began_at if loose is not None and run.began_at < loose <= step else loose
