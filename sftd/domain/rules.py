"""What a rule at submit is: a small pure function of a spec and of facts that yields what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sftd.domain.errors import Problem


@dataclass(frozen=True)
class Rules[**Facts]:
    """The rules that need the same facts. A run is refused for what `refuse` yields. What `warn` yields is possible, but hardly
    meant; these rules may assume that nothing is refused."""

    refuse: tuple[Callable[Facts, Iterable[Problem]], ...]
    warn: tuple[Callable[Facts, Iterable[Problem]], ...] = ()

    def problems(self, *args: Facts.args, **kwargs: Facts.kwargs) -> list[Problem]:
        """Why the run is refused."""
        return [problem for rule in self.refuse for problem in rule(*args, **kwargs)]

    def warnings(self, *args: Facts.args, **kwargs: Facts.kwargs) -> list[Problem]:
        """What the user should know of a run that is not refused."""
        return [problem for rule in self.warn for problem in rule(*args, **kwargs)]
