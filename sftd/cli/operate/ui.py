"""`sftd ui`."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.errors import Problem, Refused, SftdError

if TYPE_CHECKING:
    from sftd.settings import Settings

_START_SECONDS = 120.0


@click.command("ui")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on 127.0.0.1."
)
@click.option("--open/--no-open", "open_browser", default=False, help="Open a browser.")
def ui_command(runs: tuple[str, ...], port: int, open_browser: bool) -> None:
    """Serve MLflow on the runs of this home, on 127.0.0.1 only. Ctrl-C ends it.

    Prints the address of the newest run's experiment; with one RUN the address of its page, with several RUNs the address of
    their curves side by side. If a server runs already (another `sftd ui`, or the server that MLFLOW_TRACKING_URI names), the
    command only prints the address. MLflow writes its output to SFTD_HOME/logs/ui.log.

    \b
    Example:
      sftd ui --port 5001
      sftd ui brave-otter calm-heron --open
    """
    from sftd.domain.text.credentials import without_credentials
    from sftd.projections.mirrors.mlflow.server import ui_command as server_command

    settings = app.read_settings()
    app.require_home(settings)
    command = server_command(settings.mlflow_tracking_uri, settings.mlflow_artifacts, port)
    if command is None:
        address = without_credentials(settings.mlflow_tracking_uri)
        if not address.startswith(("http:", "https:")):
            what = f"{address!r} is neither a database nor a server"
            raise Refused(Problem("MLFLOW_TRACKING_URI", what, "write sqlite:///FILE or http://HOST:PORT"))
        _show(f"MLflow is at {address.rstrip('/')}/{_page(settings, runs)}", open_browser)
        return
    base = f"http://127.0.0.1:{port}/"
    if _is_taken(port):
        if not _is_ours(settings, port):
            what = f"another program listens on 127.0.0.1:{port}"
            raise Refused(Problem("--port", what, f"sftd ui --port {port + 1}"))
        _show(f"MLflow runs already, on {base}{_page(settings, runs)}", open_browser)
        return
    output.when_interrupted("MLflow was not started.")
    waiting = output.console(stderr=True).status("starting MLflow, 10 to 30 s")
    with waiting:
        page = _page(settings, runs)
        server, log = _start(settings, *command)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if _is_up(server, port):
                waiting.stop()
                _show(f"MLflow on {base}{page} (Ctrl-C ends it)", open_browser)
            code = server.wait()
        except KeyboardInterrupt:
            # After Ctrl-C in a terminal the server is ending already.
            server.terminate()
            server.wait()
            code = 0
    if code not in (0, 128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM):
        raise SftdError(f"the MLflow server ended with exit code {code}; see {log}")
    output.note("stopped")


def _show(text: str, open_browser: bool) -> None:
    """Print a sentence with an address; open the address in a browser if `open_browser`."""
    click.echo(text)
    if open_browser:
        webbrowser.open(next(word for word in text.split() if "://" in word))


def _start(settings: Settings, argv: list[str], env: dict[str, str]) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the server. Returns its process and its log file."""
    settings.logs.mkdir(mode=0o700, exist_ok=True)
    path = settings.logs / "ui.log"
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as log:
        return subprocess.Popen(argv, env=os.environ | env, stdout=log, stderr=log), path


def _is_taken(port: int) -> bool:
    """Whether another process has the port: the server would fail, but only after many seconds."""
    with socket.socket() as probe:
        # As the server does: connections in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _is_up(server: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                # Another program may have answered; then our server is about to end.
                if answer.status == 200:
                    return server.poll() is None
        except OSError:
            time.sleep(0.1)
    return False


def _is_ours(settings: Settings, port: int) -> bool:
    """Whether a `sftd ui` that serves the same runs listens there."""
    from sftd.projections.mirrors.mlflow.server import MARK_PATH, mark

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{MARK_PATH}", timeout=5) as answer:
            return bool(answer.read(100).decode(errors="replace") == mark(settings.mlflow_tracking_uri))
    except (OSError, http.client.HTTPException):
        return False


def _page(settings: Settings, runs: tuple[str, ...]) -> str:
    """The page's part of the address; empty if MLflow has none of these runs yet."""
    from sftd.operations.queries import runs as run_queries
    from sftd.projections.mirrors.mlflow import check as mlflow_check
    from sftd.projections.mirrors.mlflow.client import Tracking

    store = app.open_store(settings)
    found = app.resolve_runs(store, runs)
    newest = [row.run_id for row in run_queries.list_runs(store, limit=1)]
    wanted = found or newest
    if not wanted:
        return ""
    try:
        tracking = Tracking(settings.mlflow_tracking_uri, settings.mlflow_artifacts)
        there = [mlflow_check.place(store, tracking, run_id) for run_id in wanted]
    except SftdError as error:
        output.warn(str(error))
        return ""
    places = [place for place in there if place is not None]
    for run_id, place in zip(wanted, there, strict=True):
        if place is None and found:
            output.warn(f"MLflow has no run of {run_id} yet; a daemon mirrors it")
    experiments = list(dict.fromkeys(place.experiment for place in places))
    uuids = [place.run.uuid for place in places if place.run is not None]
    if not experiments:
        return ""
    if len(found) == 1 and uuids:
        return _address(f"experiments/{experiments[0]}/runs/{uuids[0]}")
    query = {"compareRunsMode": "CHART"}
    if len(found) > 1 and uuids:
        query["searchFilter"] = f"attributes.run_id IN ({', '.join(map(repr, uuids))})"
    if len(experiments) == 1:
        return _address(f"experiments/{experiments[0]}/runs", query)
    return _address("compare-experiments/s", {"experiments": json.dumps(experiments)} | query)


def _address(page: str, query: dict[str, str] | None = None) -> str:
    # Without workflowType MLflow opens the view for traces and prompts.
    keys = (query or {}) | {"workflowType": "machine_learning"}
    return f"#/{page}?{urllib.parse.urlencode(keys, quote_via=urllib.parse.quote)}"
