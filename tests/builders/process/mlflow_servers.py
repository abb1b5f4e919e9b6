"""A real MLflow server that can be stopped and started, and a way to it on which a request can be lost."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sftd.projections.mirrors.mlflow.client import NO_PHONE_HOME
from tests.builders.claims import port_of_our_own
from tests.builders.patience import PATIENCE

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


def mlflow_command(uri: str, artifacts: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """(argv, variables to add to the environment) of a whole MLflow server on 127.0.0.1, which also takes artifacts."""
    root = artifacts.as_uri()
    argv = [
        sys.executable,
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
    argv += ["--artifacts-destination", root, "--default-artifact-root", root]
    # Its job runner is 13 more processes and 2 GB.
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return argv, {**NO_PHONE_HOME, **jobs, "MLFLOW_BACKEND_STORE_URI": uri}


class MlflowServer:
    """An MLflow server on a SQLite file in `folder`, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = port_of_our_own()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start it."""
        argv, environment = mlflow_command(
            f"sqlite:///{self.folder}/mlflow.db", self.folder / "mlartifacts", self.port
        )
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        self._process = subprocess.Popen(argv, env=clean | environment, start_new_session=True, **quiet)

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while not self._is_up():
            assert time.monotonic() < deadline, "the MLflow server does not come up"
            with suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"the MLflow server ended with {self._process.wait(timeout=0.05)}")

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it and its worker: with SIGKILL they have no time for anything."""
        if self._process is not None:
            # SIGTERM is for the leader, which ends its worker; of SIGKILL the worker would not hear.
            (os.killpg if number == signal.SIGKILL else os.kill)(self._process.pid, number)
            self._process.wait(PATIENCE)
            self._process = None


class Way:
    """A way to a server: every request is passed on, until `lose_next` says that an answer gets lost."""

    def __init__(self, server: MlflowServer) -> None:
        self._server = server
        self._lose: Callable[[], None] | None = None
        self._changed = threading.Condition()
        self.batches = 0
        self.lost = 0
        way = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                way._pass_on(self)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _pass_on  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def lose_next(self, kill: Callable[[], None]) -> None:
        """When MLflow has taken the next batch of metrics, `kill` is called and the answer is never sent."""
        with self._changed:
            self._lose = kill

    def wait(self, is_so: Callable[[Way], bool]) -> None:
        """Wait until that is so."""
        with self._changed:
            assert self._changed.wait_for(lambda: is_so(self), timeout=PATIENCE), "no batch came"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _pass_on(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        upstream = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=PATIENCE)
        try:
            upstream.request(request.command, request.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
        except OSError:
            # Nobody there: the caller's connection breaks as well.
            request.close_connection = True
            return
        finally:
            upstream.close()
        if request.path.endswith("/log-batch") and answer.status == 200:
            with self._changed:
                lose, self._lose = self._lose, None
                if lose is not None:
                    lose()
                    self.lost += 1
                self.batches += 1
                self._changed.notify_all()
            if lose is not None:
                request.close_connection = True
                return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
