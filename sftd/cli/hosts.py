"""The hosts that may start a run: those of living daemons, and this one."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from sftd.cli import app

if TYPE_CHECKING:
    from sftd.domain.doubts import HostDevices
    from sftd.settings import Settings


def known_hosts(settings: Settings) -> list[HostDevices]:
    """The devices of each of these hosts. A database that does not answer is not waited for."""
    from sftd.domain.doubts import HostDevices
    from sftd.domain.errors import SftdError
    from sftd.launcher.inventory import visible_gpus
    from sftd.operations import waiting

    here = socket.gethostname()
    known = {here: HostDevices(here, len(visible_gpus()), settings.cpu_slots)}
    try:
        store = app.open_existing_store(settings)
        living = waiting.living_hosts(store, app.context(), app.silent_micros(settings)) if store else []
    except SftdError:
        living = []
    known.update({host.name: HostDevices(host.name, host.gpus, host.cpus) for host in living})
    return list(known.values())
