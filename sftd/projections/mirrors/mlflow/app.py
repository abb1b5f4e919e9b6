"""MLflow's own web application as `sftd ui` serves it: one process, on 127.0.0.1, without a password, and therefore only
what the pages of training runs need: `python -m sftd.projections.mirrors.mlflow.app PORT MARK [ARTIFACTS]`.

Anyone who reaches the port of a whole MLflow server can have its assistant run commands, its gateway and its webhooks send
requests, and write artifacts. Here none of that is reachable.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# Answers with the mark that the server was started with: so `sftd ui` recognises one that serves the same runs.
MARK_PATH = "/sftd-ui"
_OPEN = re.compile(
    r"/(static-files/.*|build/.*|graphql|health|version|get-artifact|model-versions/get-artifact)?"
    # Creating things is the mirror's: an experiment or a model version can name any folder or address as its artifacts.
    r"|/(ajax-)?api/[23]\.0/mlflow/(?![\w-]+/create)"
    r"(experiments|runs|metrics|registered-models|model-versions|logged-models|datasets|traces|artifacts/list|server-info)(/.*)?"
)
_READABLE = re.compile(r"/(ajax-)?api/2\.0/mlflow-artifacts/artifacts(/.*)?")
_REFUSAL = b'{"error_code": "PERMISSION_DENIED", "message": "sftd ui does not serve this part of MLflow"}'

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def is_open(method: str, path: str) -> bool:
    """Whether a request is passed on to MLflow."""
    return bool(_OPEN.fullmatch(path) or (method in ("GET", "HEAD") and _READABLE.fullmatch(path)))


class Narrowed:
    """An ASGI application that passes on to another what `is_open` lets through."""

    def __init__(self, app: _App, mark: str) -> None:
        self._app = app
        self._mark = mark.encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan" or (
            scope["type"] == "http" and is_open(scope["method"], scope["path"])
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            status, body = (200, self._mark) if scope["path"] == MARK_PATH else (403, _REFUSAL)
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def main(port: int, mark: str, artifacts: str | None) -> None:
    """Serve the store that `MLFLOW_BACKEND_STORE_URI` names until SIGINT or SIGTERM."""
    from mlflow import server

    # What `mlflow server` hands to its workers.
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    os.environ[server.BACKEND_STORE_URI_ENV_VAR] = os.environ[server.REGISTRY_STORE_URI_ENV_VAR] = uri
    if artifacts is not None:
        os.environ[server.ARTIFACT_ROOT_ENV_VAR] = artifacts

    import uvicorn
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(uri, uri, artifacts)
    uvicorn.run(Narrowed(app, mark), host="127.0.0.1", port=port, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    except KeyboardInterrupt:
        sys.exit(130)
