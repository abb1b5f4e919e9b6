"""Serve MLflow's web application for `sftd ui`: `python -m sftd.projections.mirrors.mlflow.app PORT MARK [ARTIFACTS]`.

It is one process on 127.0.0.1 without a password. A full MLflow server would let every local user run commands through its
assistant, send requests through its gateway and webhooks, and write artifacts. This one serves only the parts that the pages
of training runs need.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# Returns the server's mark, by which `sftd ui` recognises a server of the same store.
MARK_PATH = "/sftd-ui"
_OPEN = re.compile(
    r"/(static-files/.*|build/.*|graphql|health|version|get-artifact|model-versions/get-artifact)?"
    # Only the mirror creates objects: an experiment or a model version can have any folder or address as its artifacts.
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
    """Whether a request is forwarded to MLflow."""
    return bool(_OPEN.fullmatch(path) or (method in ("GET", "HEAD") and _READABLE.fullmatch(path)))


class Narrowed:
    """An ASGI application that forwards the requests that `is_open` allows to another one."""

    def __init__(self, app: _App, mark: str) -> None:
        self._app = app
        self._mark = mark.encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Handle one request."""
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

    # `mlflow server` sets the same variables for its workers.
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
