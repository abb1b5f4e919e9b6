"""Rules at submit. A rule is a small pure function of a spec and facts that yields their problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sftd.domain.errors import Problem


@dataclass(frozen=True)
class Rules[**Facts]:
    """Rules that need the same facts. sftd refuses a run for the problems that `refuse` yields. Those of `warn` are allowed but
    probably unintended; these rules may assume that nothing is refused."""

    refuse: tuple[Callable[Facts, Iterable[Problem]], ...]
    warn: tuple[Callable[Facts, Iterable[Problem]], ...] = ()

    def problems(self, *args: Facts.args, **kwargs: Facts.kwargs) -> list[Problem]:
        """The reasons to refuse the run."""
        return [problem for rule in self.refuse for problem in rule(*args, **kwargs)]

    def warnings(self, *args: Facts.args, **kwargs: Facts.kwargs) -> list[Problem]:
        """The warnings for a run that is not refused."""
        return [problem for rule in self.warn for problem in rule(*args, **kwargs)]
