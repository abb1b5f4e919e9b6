"""The hosts that may start a run: those of living daemons, and this one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sftd.cli import app

if TYPE_CHECKING:
    from sftd.domain.submit.facts import HostDevices
    from sftd.settings import Settings


def known_hosts(settings: Settings) -> list[HostDevices]:
    """The devices of each of these hosts. A host that cannot be read is left out: a submit does not depend on it."""
    from sftd.domain.errors import SftdError
    from sftd.domain.submit.facts import HostDevices
    from sftd.launcher.inventory import visible_gpus
    from sftd.launcher.processes import host_name
    from sftd.operations.queries import queue
    from sftd.wire.cores import usable_cores

    known: dict[str, HostDevices] = {}
    # `sftd doctor` and the daemon report GPUs that cannot be counted.
    with contextlib.suppress(SftdError):
        here = host_name()
        known[here] = HostDevices(here, len(visible_gpus()), settings.cpu_slots or usable_cores())
    with contextlib.suppress(SftdError):
        if store := app.open_existing_store(settings):
            for host in queue.living_hosts(store, app.context(), settings.silent_micros):
                known[host.name] = HostDevices(host.name, host.gpus, host.cpus)
    return list(known.values())
