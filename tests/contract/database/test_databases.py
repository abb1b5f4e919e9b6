"""`sftd db`: a copy is the same to the byte, and an inconsistent database is detected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sftd.cli import main
from sftd.domain.errors import Refused, ViewDamaged
from sftd.domain.log import events as e
from sftd.operations.commands import copy_database
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts
from sftd.projections import verify, views
from sftd.store.database import copying
from sftd.store.database.copying import CopyDiffers
from sftd.store.database.engine import Store, open_engine
from sftd.store.database.tables import events, metadata
from sftd.store.log import event_store, positions
from sftd.store.queue import daemons, leases
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.preflight import Preflight
from tests.builders.log.attempts import lines
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import step
from tests.builders.log.specs import FACTS, LEASE, SHAPE, SPEC


def quiet(*_: object) -> None:
    """Tell nobody how far it is."""


@pytest.fixture
def log(store: Store) -> Store:
    """Two runs: one waits, one is driven, has odd losses, a validation and two checkpoints."""
    log = Store(store.engine, before_commit=(views.catch_up,))
    with log.write(appends=False) as tx:
        daemons.register(tx, DaemonRow("d", "host", 1, 1.1, "/home", '{"cpus":2}', 1, 1))
    for _ in range(2):
        submit_all(log, CONTEXT, [Wish(SPEC, Preflight(SHAPE, FACTS, None, 3, []))], "ädä")
    lease = claim(log)
    published = [
        e.CheckpointPublished(step=n, path=f"c/{n}", bytes=n, manifest_digest="d", seconds=0.1)
        for n in (1, 2)
    ]
    validated = e.ValidationCompleted(step=2, loss=1.25, tokens=1, rows=1, seconds=0.1)
    listed: list[Any] = [step(1, float("nan")), published[0], step(2, -0.0), validated, published[1]]
    attempts.record(log, CONTEXT, lease, lines(*listed), 70, {})
    with log.write() as tx:
        positions.set_projection_position(tx.connection, "mlflow", 3)
        # As a transaction that was taken back leaves it: positions have gaps.
    with pytest.raises(RuntimeError), log.write() as tx:
        event_store.append(tx, "gone", 0, [new(step(1))], 1)
        raise RuntimeError
    attempts.record(log, CONTEXT, lease, lines(*listed, step(3)), 80, {})
    return log


def claim(log: Store) -> Any:
    found = attempts.claim(log, CONTEXT, daemon="d", host="host", fits=lambda run: True, lease_micros=LEASE)
    assert found is not None
    return found.lease


def new(event: e.Event) -> e.NewEvent:
    return e.NewEvent(event=event, event_id=CONTEXT.new_id(), occurred_at=1, actor="test")


@pytest.fixture
def other(empty_engine: sa.Engine) -> Store:
    """A database of either kind, without tables."""
    return Store(empty_engine, before_commit=(views.catch_up,))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Store]:
    """A SQLite file without tables."""
    engine = open_engine(f"sqlite:///{tmp_path}/file.db")
    yield Store(engine, before_commit=(views.catch_up,))
    engine.dispose()


def contents(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with store.read() as connection:
        return {
            table.name: sorted(repr(tuple(row)) for row in connection.execute(sa.select(table)))
            for table in metadata.sorted_tables
        }  # type: ignore[return-value]


def test_a_copy_is_the_same_on_either_kind_and_back_again(log: Store, other: Store, file: Store) -> None:
    before = contents(log)
    digests = copy_database.copy(log, other, CONTEXT, quiet, force=True)
    assert contents(other) == before
    assert {name: digest.rows for name, digest in digests.items()} == {
        n: len(rows) for n, rows in before.items()
    }
    assert len(before["events"]) == 9
    assert copy_database.copy(other, file, CONTEXT, quiet, force=True) == digests
    assert contents(file) == before


def test_a_copy_goes_on_where_the_original_was(log: Store, other: Store) -> None:
    copy_database.copy(log, other, CONTEXT, quiet, force=True)
    with other.read() as connection:
        last = event_store.last_position(connection)
        (lease,) = leases.leases(connection)
    recorded = attempts.record(other, CONTEXT, lease, lines(*[step(n) for n in range(1, 8)]), 90, {})
    assert [r.position for r in recorded] == [last + 1], "six of seven lines were ingested before the copy"
    assert verify.check_log(other, quiet).problems == []


@pytest.mark.parametrize("filled", ["by the queue", "by another copy"])
def test_a_target_in_use_is_refused(log: Store, file: Store, filled: str) -> None:
    with pytest.raises(Refused, match="daemons drive"):
        copy_database.copy(log, file, CONTEXT, quiet)
    assert file.schema_revision() is None, "nothing was written"
    copy_database.copy(log, file, CONTEXT, quiet, force=True)
    if filled == "by the queue":
        with file.write() as tx:
            for table in metadata.sorted_tables:
                if table.name != "queue":
                    tx.execute(sa.delete(table))
    before = contents(file)
    with pytest.raises(Refused, match="is not empty"):
        copy_database.copy(log, file, CONTEXT, quiet, force=True)
    assert contents(file) == before


@pytest.mark.parametrize("which", ["FROM", "TO"])
def test_tables_of_another_revision_are_refused(log: Store, file: Store, which: str) -> None:
    copy_database.copy(log, file, CONTEXT, quiet, force=True)
    with (log if which == "FROM" else file).write() as tx:
        tx.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Refused) as refused:
        copy_database.copy(log, file, CONTEXT, quiet, force=True)
    (problem,) = refused.value.problems
    assert problem.where == which
    assert "revision 9999" in problem.what


def test_a_copy_that_does_not_read_back_is_taken_back(
    log: Store, file: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = copying.insert_rows

    def lossy(connection: sa.Connection, table: sa.Table, columns: list[str], rows: Any) -> None:
        real(connection, table, columns, list(rows)[1:] if table is events else rows)

    monkeypatch.setattr(copying, "insert_rows", lossy)
    with pytest.raises(CopyDiffers, match="events"):
        copy_database.copy(log, file, CONTEXT, quiet, force=True)
    assert not any(contents(file).values())


def test_a_whole_database_is_found_whole(log: Store) -> None:
    checked = verify.check_log(log, quiet)
    assert (checked.events, checked.runs, checked.problems) == (9, 2, [])


# What is done to a database → what is said of it.
DAMAGES: dict[str, tuple[str, str]] = {
    "a lost event": ("DELETE FROM events WHERE run_id = :run AND version = 4", "last version before it is 3"),
    "a lost end": (
        "DELETE FROM events WHERE position = (SELECT max(position) FROM events)",
        "events are missing",
    ),
    "a payload that is no JSON": (
        "UPDATE events SET payload = '{' WHERE run_id = :run AND version = 4",
        "its CheckpointPublished cannot be read",
    ),
    "a payload without a field": (
        "UPDATE events SET payload = '{}' WHERE run_id = :run AND version = 3",
        "its StepCompleted cannot be read",
    ),
    "an event of a newer sftd": (
        "UPDATE events SET type = 'RunTeleported' WHERE run_id = :run AND version = 3",
        "its RunTeleported cannot be read",
    ),
    "a changed event": (
        "UPDATE events SET payload = replace(payload, '\"tokens\":10', '\"tokens\":11') WHERE run_id = :run",
        "state differ from the log",
    ),
    "a view that lies": ("UPDATE view_runs SET status = 'succeeded' WHERE run_id = :run", "status differ"),
    "a view that lost a run": ("DELETE FROM view_runs WHERE run_id = :run", "is missing"),
    "a view of no run": ("UPDATE events SET run_id = 'x' WHERE run_id = :run", "is not in the log"),
    "a lost checkpoint": ("DELETE FROM view_checkpoints WHERE step = 1", "is missing"),
    "views that stayed behind": (
        "UPDATE projection_positions SET position = 2 WHERE name = 'views'",
        "the views are at position 2",
    ),
    "a run that nobody can take": ("DELETE FROM queue WHERE run_id = :run", "has no row in the queue"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said(log: Store, damage: str) -> None:
    statement, said = DAMAGES[damage]
    with log.write(appends=False) as tx:
        run_id = tx.execute(sa.select(events.c.run_id).where(events.c.type == "AttemptClaimed")).scalar()
        # Said to the driver: a colon in a payload is no parameter.
        tx.connection.exec_driver_sql(statement.replace(":run", f"'{run_id}'"))
    problems = verify.check_log(log, quiet).problems
    assert any(said in problem for problem in problems), problems
    if "views rebuild" in problems[0]:
        views.rebuild(log)
        assert not any("view" in problem for problem in verify.check_log(log, quiet).problems)


@pytest.mark.parametrize("spoilt", ["{", "[]", '{"edge":"x","run_id":1}', "\\ud800", ""])
@pytest.mark.parametrize("view", ["view_runs.state", "view_goodput.fold"])
def test_a_view_that_cannot_be_read_ends_in_a_sentence_and_is_rebuilt(
    log: Store, database_url: str, sftd: Callable[..., Any], view: str, spoilt: str
) -> None:
    table, _, column = view.partition(".")
    with log.read() as connection:
        (run_id,) = [lease.run_id for lease in leases.leases(connection)]
    with log.write(appends=False) as tx:
        tx.execute(sa.text(f"UPDATE {table} SET {column} = :spoilt"), {"spoilt": spoilt})
    with log.read() as connection:
        (lease,) = leases.leases(connection)
    for command in (
        ["show", run_id],
        ["compare", run_id, run_id],
        ["logs", run_id],
        ["watch", run_id, "--once"],
    ):
        done = sftd(*command, url=database_url)
        assert done.exception is None or isinstance(done.exception, SystemExit), command
    said = sftd("show", run_id, url=database_url)
    assert said.exit_code == 1
    assert f"{table} cannot be read for {run_id}" in said.stderr
    assert "fix: `sftd views rebuild`" in said.stderr
    with pytest.raises(ViewDamaged):
        attempts.record(log, CONTEXT, lease, lines(*[step(n) for n in range(1, 8)]), 90, {})
    assert any(table in problem for problem in verify.check_log(log, quiet).problems)
    assert sftd("views", "rebuild", url=database_url).exit_code == 0
    assert sftd("show", run_id, url=database_url).exit_code == 0
    assert verify.check_log(log, quiet).problems == []


def test_an_event_that_cannot_be_read_ends_in_a_sentence(
    log: Store, database_url: str, sftd: Callable[..., Any]
) -> None:
    with log.write(appends=False) as tx:
        tx.connection.exec_driver_sql("UPDATE events SET payload = '{' WHERE type = 'CheckpointPublished'")
        run_id = tx.execute(sa.select(events.c.run_id).where(events.c.type == "AttemptClaimed")).scalar()
    done = sftd("checkpoints", run_id, url=database_url)
    assert done.exit_code == 1
    assert "`sftd db check` names it" in done.stderr
    assert "its CheckpointPublished cannot be read" in sftd("db", "check", url=database_url).stdout


# The command.


@pytest.fixture
def sftd(clean_environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The command line on a fresh home."""
    runner = CliRunner()

    def run(*arguments: str, url: str = "") -> Any:
        monkeypatch.setenv("SFTD_DATABASE_URL", url)
        return runner.invoke(main, list(arguments))

    return run


def test_the_command_copies_and_checks(
    log: Store, database_url: str, tmp_path: Path, sftd: Callable[..., Any]
) -> None:
    done = sftd("db", "copy", database_url, str(tmp_path / "copy.db"))
    assert done.exit_code == 2
    assert "--force" in done.stderr
    done = sftd("db", "copy", database_url, str(tmp_path / "copy.db"), "--force")
    assert done.exit_code == 0, done.stderr
    assert "9 rows" in done.stdout
    done = sftd("db", "check", url=f"sqlite:///{tmp_path}/copy.db")
    assert done.stdout == "OK: 2 runs, 9 events\n"
    engine = open_engine(f"sqlite:///{tmp_path}/copy.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM view_runs")
    engine.dispose()
    done = sftd("db", "check", url=f"sqlite:///{tmp_path}/copy.db")
    assert done.exit_code == 1
    assert "view_runs" in done.stdout


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path, sftd: Callable[..., Any]) -> None:
    for arguments in (["copy", str(tmp_path / "none.db"), str(tmp_path / "to.db")], ["check"]):
        done = sftd("db", *arguments, url=f"sqlite:///{tmp_path}/none.db")
        assert done.exit_code == 2
        assert "there is no file" in done.stderr
    assert list(tmp_path.glob("*.db")) == []


def test_no_password_is_shown_when_a_server_does_not_answer(tmp_path: Path, sftd: Callable[..., Any]) -> None:
    url = f"postgresql://u:s3cret@/db?host={tmp_path}&sslpassword=s3cret"
    for arguments in (["copy", url, str(tmp_path / "to.db")], ["check"]):
        done = sftd("db", *arguments, url=url)
        assert done.exit_code == 1
        assert "does not answer" in done.stderr
        assert "s3cret" not in done.output
