"""The command that serves MLflow's pages for a local store."""

from __future__ import annotations

import sys
from pathlib import Path

from sftd.projections.mirrors.mlflow.app import MARK_PATH
from sftd.projections.mirrors.mlflow.client import NO_PHONE_HOME, is_remote
from sftd.projections.mirrors.mlflow.writer import position_name

__all__ = ["MARK_PATH", "mark", "ui_command"]


def mark(tracking_uri: str) -> str:
    """The response on `MARK_PATH` of a server for the store at `tracking_uri`."""
    return position_name(tracking_uri)


def ui_command(
    tracking_uri: str, artifacts_dir: Path | None, port: int
) -> tuple[list[str], dict[str, str]] | None:
    """(argv, variables to add to the environment) of a light MLflow server on 127.0.0.1 that serves the store at
    `tracking_uri`; None when `tracking_uri` is a server already.

    The server answers 200 on `/health` once it is up. It is one process; SIGINT or SIGTERM ends it.
    """
    if is_remote(tracking_uri):
        return None
    argv = [sys.executable, "-P", "-m", "sftd.projections.mirrors.mlflow.app", str(port), mark(tracking_uri)]
    if artifacts_dir is not None:
        argv.append(artifacts_dir.absolute().as_uri())
    return argv, {
        **NO_PHONE_HOME,
        # Like -P, for the server's child processes: they import no module from the user's working folder.
        "PYTHONSAFEPATH": "1",
        # Not in argv, which every user can read: the URI of a database may contain a password.
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ENABLE_AI_GATEWAY": "false",
        # Prevents DNS rebinding: requests from other sites whose name resolves to this machine.
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port},localhost:{port}",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
    }
