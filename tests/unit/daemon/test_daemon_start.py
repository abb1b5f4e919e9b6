"""A daemon that starts before its database: it asks again, and keeps nothing of the times before."""

from __future__ import annotations

import threading
from pathlib import Path

import click
import pytest
import sqlalchemy as sa

from sftd.cli import app, main
from sftd.cli.daemon import command as daemon
from sftd.settings import read
from sftd.store.database.engine import DatabaseUnreachable


def test_nothing_is_kept_of_a_database_that_did_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked every second, for days if need be."""
    kept: list[object] = []
    monkeypatch.setattr(click.Context, "call_on_close", lambda _, f: kept.append(f))
    settings = read(
        {"SFTD_HOME": str(tmp_path), "SFTD_DATABASE_URL": f"postgresql://nobody@/no?host={tmp_path}"}
    )
    with click.Context(main), pytest.raises(DatabaseUnreachable):
        app.open_store(settings)
    assert kept == []


def test_a_database_that_goes_away_between_two_questions_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[object] = [
        DatabaseUnreachable("it does not answer"),
        sa.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly")),
        "the store",
    ]

    def answer(_: object) -> object:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(app, "open_store", answer)
    monkeypatch.setattr(daemon, "_DATABASE_SECONDS", 0)
    settings = read({"SFTD_HOME": str(tmp_path), "SFTD_DATABASE_URL": "postgresql://nobody@/none"})
    assert daemon._open_when_it_answers(settings, threading.Event()) == "the store"
    assert [r.getMessage() for r in caplog.records] == [
        "it does not answer; trying again",
        "server closed the connection unexpectedly; trying again",
    ]


def test_a_daemon_in_another_folder_has_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    given = {
        "SFTD_HOME": "home",
        "SFTD_DATABASE_URL": "sqlite:///own.db",
        "SFTD_METRICS_FILE": "own.prom",
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    }
    expected = read(given)
    monkeypatch.chdir(there)
    assert read(given | daemon.resolved(expected)) == expected
    assert read(given) != expected
