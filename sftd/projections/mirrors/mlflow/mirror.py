"""MLflow as a mirror, and its checks in `sftd doctor`."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from urllib.request import Request, urlopen

import sqlalchemy as sa

from sftd.domain.finding import Finding, broken, ok, warning
from sftd.domain.text.credentials import without_credentials
from sftd.projections.mirrors.mlflow.client import is_remote
from sftd.projections.mirrors.mlflow.writer import MlflowWriter, position_name
from sftd.settings import Settings, sqlite_file
from sftd.store.database.engine import Store

_ANSWER_SECONDS = 5.0


class Mlflow:
    """The MLflow mirror; see `Mirror`."""

    name = "MLflow"

    def position(self, settings: Settings) -> str | None:
        """The name of the mirror's position; None if MLFLOW_TRACKING_URI is empty."""
        return position_name(settings.mlflow_tracking_uri) if settings.mlflow_tracking_uri else None

    def open(self, settings: Settings, store: Store) -> MlflowWriter:
        """Make the writer. Its first call imports mlflow and connects."""
        return MlflowWriter(store, settings.mlflow_tracking_uri, settings.mlflow_artifacts)

    def check(self, settings: Settings) -> Iterator[Finding]:
        """Check whether runs can be mirrored."""
        uri = settings.mlflow_tracking_uri
        if not uri:
            yield ok(self.name, "the mirror is off (MLFLOW_TRACKING_URI is empty)")
            return
        try:
            mine = version("mlflow")
        except PackageNotFoundError:
            yield broken(
                self.name,
                "is not installed",
                "pip install mlflow, or set MLFLOW_TRACKING_URI= to turn it off",
            )
            return
        shown = without_credentials(uri)
        if is_remote(uri):
            yield _server(uri, shown, mine)
        elif (file := sqlite_file(uri)) is not None and not file.exists():
            yield ok(self.name, f"{mine}, {shown}: will be made when a run is mirrored")
        else:
            yield _tracking_store(uri, shown, mine)


def _tracking_store(uri: str, shown: str, mine: str) -> Finding:
    try:
        engine = sa.create_engine(uri)
        with engine.connect() as connection:
            sa.inspect(connection).get_table_names()
        engine.dispose()
    except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        return warning(
            Mlflow.name, f"{shown} does not answer: {reason}", "runs continue; the mirror catches up later"
        )
    return ok(Mlflow.name, f"{mine}, {shown}")


def _server(uri: str, shown: str, mine: str) -> Finding:
    if not uri.startswith(("http://", "https://")):
        fix = "write sqlite:///FILE or http://HOST:PORT"
        return broken(Mlflow.name, f"{shown} is neither a database nor a server", fix)
    bare = re.sub(r"//[^/@\s]*@", "//", uri).rstrip("/")
    request = Request(f"{bare}/version")  # noqa: S310  its scheme was just checked
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}".encode()
        request.add_header("Authorization", "Basic " + base64.b64encode(pair).decode())
    try:
        with urlopen(request, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310
            theirs = answer.read(100).decode(errors="replace").strip()
    except (OSError, HTTPException, ValueError) as error:
        reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
        fix = "runs continue, and the mirror catches up later; check MLFLOW_TRACKING_URI and the server"
        return warning(Mlflow.name, f"{shown} does not answer: {reason}", fix)
    if theirs.partition(".")[0] != mine.partition(".")[0]:
        fix = "use the same major version on both sides"
        return warning(Mlflow.name, f"{shown} is version {theirs[:20]}, the client {mine}", fix)
    return ok(Mlflow.name, f"{shown}, version {theirs}, client {mine}")
