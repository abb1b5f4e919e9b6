"""Rules of `launch`: settings that the launcher must support, and settings that it ignores."""

from __future__ import annotations

from collections.abc import Iterator

from sftd.domain.errors import Problem
from sftd.domain.rules import Rules
from sftd.domain.spec.launch.launchers import KINDS, kind_of
from sftd.domain.spec.sections import Launch
from sftd.domain.spec.spec import Spec


def several_machines(spec: Spec) -> Iterator[Problem]:
    """A launcher that uses the devices of the daemon's host has only one machine."""
    kind = kind_of(spec.launch.launcher)
    if kind.uses_host_devices and spec.launch.nnodes > 1:
        what = f"{spec.launch.nnodes}: the {kind.name} launcher starts ranks on the daemon's own machine only"
        able = " or ".join(other.name for other in KINDS.values() if not other.uses_host_devices)
        yield Problem("launch.nnodes", what, f"set it to 1, or launch.launcher to {able}")


def unsupported_by_launcher(spec: Spec) -> Iterator[Problem]:
    """The launcher must be able to start the run."""
    yield from kind_of(spec.launch.launcher).supports(spec)


def settings_of_another_launcher(spec: Spec) -> Iterator[Problem]:
    """A section of another launcher has no effect."""
    for name in sorted(KINDS.keys() - {spec.launch.launcher}):
        if getattr(spec.launch, name, None) != getattr(Launch(), name, None):
            what = f"is not used: launch.launcher is {spec.launch.launcher}"
            yield Problem(f"launch.{name}", what, f"set launch.launcher to {name}")


def doubts_of_launcher(spec: Spec) -> Iterator[Problem]:
    """The launcher can start the run, but a setting is probably unintended."""
    yield from kind_of(spec.launch.launcher).rules.warnings(spec)


LAUNCH = Rules(
    refuse=(several_machines, unsupported_by_launcher),
    warn=(settings_of_another_launcher, doubts_of_launcher),
)
