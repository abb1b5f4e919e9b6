"""What is known of each launcher before it starts anything. `KINDS` has a row for each; nothing else compares their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sftd.domain.errors import Problem
from sftd.domain.spec import slurm
from sftd.domain.spec.sections import Launch
from sftd.domain.spec.spec import Spec

# Problems, then warnings.
Checked = tuple[list[Problem], list[Problem]]


class Job(Protocol):
    """What a resource manager says of a job, in its words. `job` is its number, empty until it has one."""

    @property
    def job(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...


def _nothing(spec: Spec) -> Checked:
    return [], []


@dataclass(frozen=True, kw_only=True)
class LauncherKind:
    """A launcher. `name` is that of `launch.launcher`, and of its section of `launch` if it has one; `shown` is what people
    call it.

    With `uses_host_devices` its attempts take GPUs or cores of the daemon's host. Otherwise each takes one place, of which a
    daemon has a fixed number, and its ranks may run on other machines. `is_managed`: a resource manager queues the attempts,
    may end them, and reports on them to every host. `variables` are those of the environment that its commands need.
    `check` finds (problems, warnings) in a spec."""

    name: str
    shown: str
    uses_host_devices: bool = False
    is_managed: bool = False
    variables: tuple[str, ...] = ()
    check: Callable[[Spec], Checked] = _nothing

    def supports(self, spec: Spec) -> Checked:
        """(problems, warnings) of a spec whose attempts this launcher would start."""
        problems, warnings = self.check(spec)
        others = [kind for kind in KINDS.values() if kind.name != self.name]
        if self.uses_host_devices and spec.launch.nnodes > 1:
            what = f"{spec.launch.nnodes}: the {self.name} launcher starts ranks on the daemon's own machine only"
            able = " or ".join(kind.name for kind in others if not kind.uses_host_devices)
            problems.append(Problem("launch.nnodes", what, f"set it to 1, or launch.launcher to {able}"))
        for other in others:
            if getattr(spec.launch, other.name, None) != getattr(Launch(), other.name, None):
                what = f"is not used: launch.launcher is {self.name}"
                fix = f"set launch.launcher to {other.name}"
                warnings.append(Problem(f"launch.{other.name}", what, fix))
        return problems, warnings

    def describe(self, job: Job) -> str:
        """The report on a job as people read it beside a run."""
        number = f"job {job.job} " if job.job else ""
        return f"{self.shown}: {number}{job.state.lower()}" + (f" ({job.reason})" if job.reason else "")


LOCAL = LauncherKind(name="local", shown="this host", uses_host_devices=True)
SLURM = LauncherKind(
    name="slurm", shown="Slurm", is_managed=True, variables=("SLURM_CONF",), check=slurm.check
)
KINDS = {kind.name: kind for kind in (LOCAL, SLURM)}


def kind_of(name: str) -> LauncherKind:
    """The launcher of this name. One that another version of sftd has takes places that no daemon of this version has."""
    return KINDS.get(name) or LauncherKind(name=name, shown=name)


def holder_of(devices: Sequence[str]) -> LauncherKind:
    """The launcher whose attempt holds these devices: places (`NAME:0`) are called by its name."""
    return KINDS.get(devices[0].partition(":")[0], LOCAL) if devices else LOCAL
