"""Steps that are trained again, held against the log one after the other."""

from __future__ import annotations

import math
from typing import Any

from sftd.domain.log import events as e
from sftd.domain.log.history import Timeline
from sftd.domain.repro.environment import environment_differences, gives_same_numbers
from sftd.domain.repro.steps import differences


class Comparing:
    """Compares step after step with the log's: bit for bit, but for rounding from the first step on that was recorded
    without determinism or in another environment, which those behind it build on.

    `now` is the environment in which they are trained again, `extra` maps what else differs (the data files, settings)
    to [the log's, now's].
    """

    def __init__(self, log: Timeline, now: e.ModelLoaded, extra: dict[str, list[Any]]) -> None:
        self._log = log
        self._now = now
        self._extra = extra
        self.agreeing = 0
        self.is_exact = True
        # Whether differences as small as rounding are no divergence.
        self.may_round = not now.is_deterministic

    def environment(self, step: int) -> dict[str, list[Any]]:
        """What differs between the attempt that recorded a step and now."""
        return environment_differences(self._log.environment(step), self._now.environment) | self._extra

    def add(self, redone: e.StepCompleted) -> dict[str, dict[str, Any]]:
        """Take in the step that comes next. Returns what came out otherwise; empty when it agrees."""
        was = self._log.steps[redone.step]
        environment = self._log.environment(redone.step)
        self.may_round = (
            self.may_round
            or not environment.get("deterministic", True)
            or not gives_same_numbers(environment, self._now.environment)
        )
        found = differences(was, redone, is_exact=True)
        if found and self.may_round:
            self.is_exact = False
            found = differences(
                was, redone, is_exact=False, dtype=str(self._now.environment.get("dtype", ""))
            )
        if not found:
            self.agreeing += 1
        return found


def by_how_much(recorded: object, redone: object) -> str:
    """How far a number is off, in words; empty where that says nothing."""
    if not isinstance(recorded, int | float) or not isinstance(redone, int | float):
        return ""
    if not (math.isfinite(recorded) and math.isfinite(redone)) or recorded == 0:
        return ""
    return f"{100 * (redone - recorded) / abs(recorded):+.2g} %"
