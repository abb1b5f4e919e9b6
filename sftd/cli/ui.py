"""`sftd ui`."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
import webbrowser
from typing import TYPE_CHECKING

import click

from sftd.cli import app, output
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

    Prints the address of the experiment of the newest run; with one RUN that of its page, with several that of their
    curves side by side. When MLFLOW_TRACKING_URI names a server, there is one already, and only the address is printed.

    \b
    Example:
      sftd ui --port 5001
      sftd ui brave-otter calm-heron --open
    """
    from sftd.projections.mlflow_client import without_credentials
    from sftd.projections.mlflow_server import ui_command as server_command

    settings = app.read_settings()
    app.need_home(settings)
    command = server_command(settings.mlflow_tracking_uri, settings.mlflow_artifacts, port)
    if command is None:
        address = without_credentials(settings.mlflow_tracking_uri)
        if not address.startswith(("http:", "https:")):
            what = f"{address!r} is neither a database nor a server"
            raise Refused(Problem("MLFLOW_TRACKING_URI", what, "write sqlite:///FILE or http://HOST:PORT"))
        url = address.rstrip("/") + "/" + _page(settings, runs)
        click.echo(f"MLflow is at {url}")
        if open_browser:
            webbrowser.open(url)
        return
    if _is_taken(port):
        fix = f"sftd ui --port {port + 1}; if that is another `sftd ui`, end it with Ctrl-C, or look at that one"
        raise Refused(Problem("--port", f"another program listens on 127.0.0.1:{port}", fix))
    url = f"http://127.0.0.1:{port}/{_page(settings, runs)}"
    argv, env = command
    server = subprocess.Popen(argv, env=os.environ | env)
    # Ctrl-C reaches the server by itself, and what it says of its end comes before ours.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    if _is_up(server, port):
        click.echo(f"MLflow on {url} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(url)
    code = server.wait()
    # 0 and the signals that people end it with.
    if code not in (0, -signal.SIGINT, -signal.SIGTERM):
        raise SftdError(f"the MLflow server ended with {code}; is port {port} in use? Try --port {port + 1}")


def _is_taken(port: int) -> bool:
    """Whether the server would end, after many seconds, because somebody else has its port."""
    with socket.socket() as probe:
        # As the server does: what remains of closed connections is in nobody's way.
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
                # Something else may have had the port all along; then our server is about to end.
                if answer.status == 200:
                    return server.poll() is None
        except OSError:
            time.sleep(0.1)
    return False


def _page(settings: Settings, runs: tuple[str, ...]) -> str:
    """The part of the address that names MLflow's page; empty when MLflow has nothing of ours yet."""
    from sftd.operations import reading
    from sftd.projections import mlflow_check
    from sftd.projections.mlflow_client import Tracking

    store = app.open_store(settings)
    found = app.pick_all(store, runs)
    newest = [row.run_id for row in reading.list_runs(store, limit=1)]
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
    if len(found) > 1 and len(uuids) > 1:
        # Its page of curves; its page of comparisons shows last values only.
        query = {
            "runs": json.dumps(uuids),
            "experiments": json.dumps(experiments),
            "metric": json.dumps("loss"),
            "plot_metric_keys": json.dumps(["loss"]),
            "x_axis": "step",
        }
        return "#/metric?" + urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
    if found and uuids:
        return f"#/experiments/{experiments[0]}/runs/{uuids[0]}"
    return f"#/experiments/{experiments[0]}/runs?compareRunsMode=CHART" if experiments else ""
