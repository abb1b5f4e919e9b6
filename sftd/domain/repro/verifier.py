"""Comparison of the steps that `sftd verify` recomputes with the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sftd.domain.log import events as e
from sftd.domain.log.timeline import LoggedStep
from sftd.domain.repro.environment import environment_differences, gives_same_numbers
from sftd.domain.repro.steps import compare


class Comparing:
    """Compares steps with the log bit for bit. From the first step that was recorded without determinism or in another
    environment, it compares to within rounding, because later steps depend on that one.

    `log` is the run's timeline (see `logged_steps`), `now` describes the current environment, and `extra` maps other
    differences (data files, settings) to [the log's, the current one].
    """

    def __init__(
        self, log: Mapping[int, LoggedStep], now: e.ModelLoaded, extra: dict[str, list[Any]]
    ) -> None:
        self._log = log
        self._now = now
        self._extra = extra
        self.agreeing = 0
        self.is_exact = True
        # Whether differences within rounding are accepted.
        self.may_round = not now.is_deterministic

    def environment(self, step: int) -> dict[str, list[Any]]:
        """Differences between the environment that recorded a step and the current one."""
        return environment_differences(self._log[step].environment, self._now.environment) | self._extra

    def add(self, redone: e.StepCompleted) -> dict[str, dict[str, Any]]:
        """Compare the next step. Returns the numbers that differ; empty if the step matches."""
        was, _version, environment = self._log[redone.step]
        self.may_round = (
            self.may_round
            or not environment.get("deterministic", True)
            or not gives_same_numbers(environment, self._now.environment)
        )
        dtype = str(self._now.environment.get("dtype", ""))
        found = compare(was, redone, is_exact=not self.may_round, dtype=dtype)
        self.is_exact = self.is_exact and (found.is_exact or not self.may_round)
        self.agreeing += not found.differs
        return found.differs


def by_how_much(recorded: object, redone: object) -> str:
    """The relative difference of a number in percent; empty if it is undefined."""
    if not isinstance(recorded, int | float) or not isinstance(redone, int | float):
        return ""
    if not (math.isfinite(recorded) and math.isfinite(redone)) or recorded == 0:
        return ""
    return f"{100 * (redone - recorded) / abs(recorded):+.2g} %"
