"""How MLflow's own server is started to look at an embedded store."""

from __future__ import annotations

import sys
from pathlib import Path

from sftd.projections.mlflow_client import NO_PHONE_HOME, is_remote


def ui_command(
    tracking_uri: str, artifacts_dir: Path | None, port: int
) -> tuple[list[str], dict[str, str]] | None:
    """(argv, variables to add to the environment) of a light MLflow server on 127.0.0.1 that serves the store at
    `tracking_uri`; None when `tracking_uri` is a server already.

    The server answers 200 on `/health` once it is up. SIGTERM to the started process ends it and its worker.
    """
    if is_remote(tracking_uri):
        return None
    argv = [
        sys.executable,
        "-P",
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    environment = {
        **NO_PHONE_HOME,
        # As -P, for the processes that the server starts: no module is taken from the user's working folder.
        "PYTHONSAFEPATH": "1",
        # Not in argv: the URI of a database may hold a password, and everybody can list processes.
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,
        # Its job runner is 13 more processes and 2 GB.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if artifacts_dir is not None:
        root = artifacts_dir.absolute().as_uri()
        # Clients upload through the server into the same folder; experiments made here keep its path.
        argv += ["--artifacts-destination", root, "--default-artifact-root", root]
    return argv, environment
