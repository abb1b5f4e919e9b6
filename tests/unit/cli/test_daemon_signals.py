"""A signal ends the daemon wherever it interrupts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The lock is what `wait` holds at its begin; a handler that needs it within the main thread waits for itself.
PROGRAM = """
import signal
from sftd.cli.daemon.command import set_on_signals

stop = set_on_signals()
with stop._cond:
    signal.raise_signal(signal.{name})
stop.wait()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_on_the_way_into_a_wait_ends_the_daemon(name: str) -> None:
    program = [sys.executable, "-c", PROGRAM.format(name=name)]
    # Only a handler that blocks takes so long.
    assert subprocess.run(program, timeout=30, check=False).returncode == 0
