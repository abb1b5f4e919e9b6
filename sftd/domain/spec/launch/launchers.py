"""Static properties of the launchers. `KINDS` has an entry for each; no other code compares launcher names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sftd.domain.errors import Problem
from sftd.domain.rules import Rules
from sftd.domain.spec.launch import slurm
from sftd.domain.spec.spec import Spec


class Job(Protocol):
    """A resource manager's report on a job, in the manager's terms. `job` is the job number, empty until it is assigned."""

    @property
    def job(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...


_NO_RULES: Rules[[Spec]] = Rules(refuse=())


@dataclass(frozen=True, kw_only=True)
class LauncherKind:
    """A launcher. `name` is the value of `launch.launcher`, and the name of its section of `launch` if it has one. `shown` is
    its display name.

    With `uses_host_devices` its attempts take GPUs or cores of the daemon's host. Otherwise each attempt takes one place, of
    which a daemon has a fixed number, and its ranks may run on other machines. `is_managed`: a resource manager queues the
    attempts, may end them, and reports on them to every host. `variables` are the environment variables that its commands
    need. `rules` apply to specs that use this launcher."""

    name: str
    shown: str
    uses_host_devices: bool = False
    is_managed: bool = False
    variables: tuple[str, ...] = ()
    rules: Rules[[Spec]] = _NO_RULES

    def supports(self, spec: Spec) -> list[Problem]:
        """The reasons why this launcher cannot start a run of `spec`; empty if it can."""
        return self.rules.problems(spec)

    def describe(self, job: Job) -> str:
        """The report on a job as text for the user."""
        number = f"job {job.job} " if job.job else ""
        return f"{self.shown}: {number}{job.state.lower()}" + (f" ({job.reason})" if job.reason else "")


LOCAL = LauncherKind(name="local", shown="this host", uses_host_devices=True)
SLURM = LauncherKind(
    name="slurm", shown="Slurm", is_managed=True, variables=("SLURM_CONF",), rules=slurm.RULES
)
KINDS = {kind.name: kind for kind in (LOCAL, SLURM)}


def kind_of(name: str) -> LauncherKind:
    """The launcher of this name. For an unknown name (from another version of sftd), a launcher without any places."""
    return KINDS.get(name) or LauncherKind(name=name, shown=name)


def holder_of(devices: Sequence[str]) -> LauncherKind:
    """The launcher whose attempt holds these devices. The name of a place (`NAME:0`) starts with that of its launcher."""
    return KINDS.get(devices[0].partition(":")[0], LOCAL) if devices else LOCAL
