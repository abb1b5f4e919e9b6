"""What one test process has for itself on a machine that it shares with others: a port, a number.

A port that was free a moment ago may be another's by the time that it is used: the kernel gives such ports to any program that connects
to something. So these are taken from below those that it gives, and claimed until this process ends.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from pathlib import Path

_claims: list[socket.socket] = []


def claim(what: str, numbers: Iterable[int], is_free: Callable[[int], bool] = lambda _: True) -> int:
    """The first of `numbers` that no other process of tests has claimed."""
    for number in numbers:
        # Its name is nobody else's as long as it is open, which it is as long as this process lives.
        mine = socket.socket(socket.AF_UNIX)
        try:
            mine.bind(f"\0sftd-tests/{what}/{number}")
        except OSError:
            mine.close()
            continue
        if is_free(number):
            _claims.append(mine)
            return number
        mine.close()
    raise AssertionError(f"no {what} is free")


def port_of_our_own() -> int:
    """A port on which nobody listens, nor will."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_given = int(given.read_text().split()[0]) if given.exists() else 32768
    return claim("port", range(max(first_given, 20_000) - 1, 1024, -1), _is_free)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
