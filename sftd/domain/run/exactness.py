"""Whether a step that is computed again must match the log bit for bit: `Run.is_exact`, how it returns after a change, and the
comparison under it.

The log's steps up to `Run.loose_until` may be of another environment than the last attempt's, or build on such. An attempt
that begins before that compares to within rounding; once it has computed all of them again, only those before it began
are left.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sftd.domain.log import events as e
from sftd.domain.repro.environment import gives_same_numbers
from sftd.domain.repro.steps import Redone, compare
from sftd.domain.run.state import Run


def compare_with_log(log: Mapping[int, e.StepCompleted], run: Run, event: e.Event) -> Redone | None:
    """Compare a step that the run's last attempt computed again. `log` is what it must reproduce (see `steps_to_redo`), `run`
    the state since the attempt's `ModelLoaded`. None for a step that the log does not have, and for any other event."""
    was = log.get(event.step) if isinstance(event, e.StepCompleted) else None
    if was is None or not isinstance(event, e.StepCompleted):
        return None
    return compare(was, event, is_exact=run.is_exact, dtype=run.dtype)


def at_load(run: Run, loaded: e.ModelLoaded) -> Run:
    """The run once an attempt has loaded its model."""
    loose = run.loose_until
    # A state of before there was `loose_until` says only that some attempt was another.
    has_changed = not gives_same_numbers(run.environment, loaded.environment) or (
        loose is None and not run.is_exact
    )
    # What follows builds on other numbers than the log's.
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
    """`loose_until` once an attempt is to begin from a checkpoint of `from_step`."""
    is_superseded = any(c.superseded for c in run.checkpoints if c.step == from_step)
    # Where the environment has changed, it may not be the state on which the log's later steps build.
    return run.highest_step if is_superseded and run.loose_until is not None else run.loose_until


def at_step(run: Run, step: int) -> int | None:
    """`loose_until` once `step` is done."""
    loose = run.loose_until
    return run.began_at if loose is not None and run.began_at < loose <= step else loose
