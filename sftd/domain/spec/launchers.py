"""What is known of each launcher before it starts anything. `KINDS` has a row for each; nothing else compares their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sftd.domain.errors import Problem
from sftd.domain.rules import Rules
from sftd.domain.spec import slurm
from sftd.domain.spec.spec import Spec


class Job(Protocol):
    """What a resource manager says of a job, in its words. `job` is its number, empty until it has one."""

    @property
    def job(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...


_NO_RULES: Rules[[Spec]] = Rules(refuse=())


@dataclass(frozen=True, kw_only=True)
class LauncherKind:
    """A launcher. `name` is that of `launch.launcher`, and of its section of `launch` if it has one; `shown` is what people
    call it.

    With `uses_host_devices` its attempts take GPUs or cores of the daemon's host. Otherwise each takes one place, of which a
    daemon has a fixed number, and its ranks may run on other machines. `is_managed`: a resource manager queues the attempts,
    may end them, and reports on them to every host. `variables` are those of the environment that its commands need.
    `rules` are those of a spec whose attempts it starts."""

    name: str
    shown: str
    uses_host_devices: bool = False
    is_managed: bool = False
    variables: tuple[str, ...] = ()
    rules: Rules[[Spec]] = _NO_RULES

    def supports(self, spec: Spec) -> list[Problem]:
        """Why this launcher cannot start a run of `spec`; empty where it can."""
        return self.rules.problems(spec)

    def describe(self, job: Job) -> str:
        """The report on a job as people read it beside a run."""
        number = f"job {job.job} " if job.job else ""
        return f"{self.shown}: {number}{job.state.lower()}" + (f" ({job.reason})" if job.reason else "")


LOCAL = LauncherKind(name="local", shown="this host", uses_host_devices=True)
SLURM = LauncherKind(
    name="slurm", shown="Slurm", is_managed=True, variables=("SLURM_CONF",), rules=slurm.RULES
)
KINDS = {kind.name: kind for kind in (LOCAL, SLURM)}


def kind_of(name: str) -> LauncherKind:
    """The launcher of this name. One that another version of sftd has takes places that no daemon of this version has."""
    return KINDS.get(name) or LauncherKind(name=name, shown=name)


def holder_of(devices: Sequence[str]) -> LauncherKind:
    """The launcher whose attempt holds these devices: places (`NAME:0`) are called by its name."""
    return KINDS.get(devices[0].partition(":")[0], LOCAL) if devices else LOCAL
