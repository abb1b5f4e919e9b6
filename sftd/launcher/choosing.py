"""Each attempt to the launcher that its spec names."""

from __future__ import annotations

from collections.abc import Mapping

from sftd.launcher.inventory import Need
from sftd.launcher.seam import Attempt, Launcher
from sftd.wire.attempt.directory import AttemptDir, Order


class ByName:
    """Several launchers as one, by `launch.launcher`."""

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = launchers

    def start(
        self, directory: AttemptDir, order: Order, need: Need, devices: list[str]
    ) -> tuple[Attempt, list[str]]:
        """Start an attempt where its spec says."""
        return self._launchers[order.spec.launch.launcher].start(directory, order, need, devices)

    def adopt(self, directory: AttemptDir, fallback_token: str) -> Attempt:
        """Find an attempt where its order says it was started. Raises `OSError`: who asked the wrong one would be told that
        a job that trains is dead."""
        try:
            name = directory.order().spec.launch.launcher
        except (FileNotFoundError, ValueError):
            process = directory.process()
            # Without either nothing was started.
            name = "slurm" if process is not None and not process.pid else "local"
        return self._launchers[name].adopt(directory, fallback_token)
