"""`sftd ui`."""

from __future__ import annotations

import os
import webbrowser

import click

from sftd.cli import app
from sftd.domain.errors import Problem, Refused


@click.command("ui")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on 127.0.0.1."
)
@click.option("--open/--no-open", "open_browser", default=False, help="Open a browser.")
def ui_command(port: int, open_browser: bool) -> None:
    """Serve MLflow on the runs of this home, on 127.0.0.1 only. Ctrl-C ends it.

    When MLFLOW_TRACKING_URI names a server, there is one already: its address is printed.

    \b
    Example:
      sftd ui --port 5001
    """
    from sftd.projections.mlflow_client import without_credentials
    from sftd.projections.mlflow_server import ui_command as server_command

    settings = app.read_settings()
    app.make_home(settings)
    command = server_command(settings.mlflow_tracking_uri, settings.mlflow_artifacts, port)
    url = f"http://127.0.0.1:{port}"
    if command is None:
        address = without_credentials(settings.mlflow_tracking_uri)
        if not address.startswith(("http:", "https:")):
            what = f"{address!r} is neither a database nor a server"
            raise Refused(Problem("MLFLOW_TRACKING_URI", what, "write sqlite:///FILE or http://HOST:PORT"))
        click.echo(f"MLflow is at {address}")
        return
    argv, env = command
    click.echo(f"MLflow on {url} (Ctrl-C ends it)")
    if open_browser:
        webbrowser.open(url)
    os.execvpe(argv[0], argv, os.environ | env)  # noqa: S606
