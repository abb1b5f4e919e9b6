"""The registered launchers, and the choice of one for each attempt."""

from __future__ import annotations

from collections.abc import Mapping

from sftd.domain.spec.launch.launchers import LOCAL, SLURM, LauncherKind, holder_of, kind_of
from sftd.launcher.inventory import Need
from sftd.launcher.local import LocalAttempt
from sftd.launcher.seam import Attempt, Launcher, Registered
from sftd.launcher.slurm import doctor as slurm_doctor
from sftd.launcher.slurm import script as slurm_script
from sftd.launcher.slurm.attempt import SlurmLauncher
from sftd.wire.attempt.directory import AttemptDir, Order

LAUNCHERS = {
    LOCAL.name: Registered(make=lambda settings: LocalAttempt),
    SLURM.name: Registered(
        make=SlurmLauncher.of,
        places=SlurmLauncher.places,
        script=slurm_script.script,
        doctor=slurm_doctor.examine,
    ),
}


def launcher_of(directory: AttemptDir) -> LauncherKind:
    """The launcher that an attempt's order names, or else the one whose places the attempt holds. With neither in the folder,
    nothing was started. Raises `OSError`."""
    try:
        return kind_of(directory.order().spec.launch.launcher)
    except (FileNotFoundError, ValueError):
        process = directory.process()
        return holder_of(process.devices if process is not None else ())


class ByName:
    """A launcher that forwards each attempt to the one that `launch.launcher` names."""

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = launchers

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        """Start an attempt with the launcher of its spec."""
        return self._launchers[order.spec.launch.launcher].start(directory, order, need, devices)

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        """Find an attempt with the launcher that started it. Raises `OSError` if that is unknown: another launcher would take a
        living job for dead."""
        return self._launchers[launcher_of(directory).name].adopt(directory, fallback_token)
