"""Whether a step that is computed again must come out bit for bit: `Run.is_exact`, and how it comes back after a change.

The log's steps up to `Run.loose_until` may be of another environment than the last attempt's, or build on such. An attempt
that begins before that compares but for rounding; once it has computed all of them again, only those before it began
are left.
"""

from __future__ import annotations

from sftd.domain.log import events as e
from sftd.domain.repro.environment import gives_same_numbers
from sftd.domain.run.state import Run


def at_load(run: Run, loaded: e.ModelLoaded) -> tuple[bool, int | None]:
    """`is_exact` and `loose_until` once another attempt of the run has loaded its model."""
    loose = run.loose_until
    # A state of before there was `loose_until` says only that some attempt was another.
    has_changed = not gives_same_numbers(run.environment, loaded.environment) or (
        loose is None and not run.is_exact
    )
    # From before it, all that follows comes out a little otherwise than the log has it.
    if has_changed or (loose is not None and run.step < loose):
        loose = run.highest_step
    return loaded.is_deterministic and run.step >= (loose or 0), loose


def at_claim(run: Run, from_step: int) -> int | None:
    """`loose_until` once an attempt is to begin from a checkpoint of `from_step`."""
    is_superseded = any(c.superseded for c in run.checkpoints if c.step == from_step)
    # Where the environment has changed, it may not be the state on which the log's later steps build.
    return run.highest_step if is_superseded and run.loose_until is not None else run.loose_until


def at_step(run: Run, step: int) -> int | None:
    """`loose_until` once `step` is done."""
    loose = run.loose_until
    return run.began_at if loose is not None and run.began_at < loose <= step else loose
