"""The live board on a real database: what it shows, what a look costs, and a database that goes away."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from sftd.cli import main
from sftd.cli.watch.view import board_lines, run_lines
from sftd.domain.errors import SftdError
from sftd.domain.log import events as e
from sftd.domain.queue.order import Limits
from sftd.operations.commands.submit import Wish, submit_all
from sftd.operations.driving import attempts
from sftd.operations.queries.board import Observer, RunObserver
from sftd.store.database.engine import Store
from sftd.store.queries.names import run_names
from sftd.store.queue import daemons
from sftd.store.queue.daemons import DaemonRow
from sftd.wire.preflight import Preflight
from tests.builders.log.clock import CONTEXT
from tests.builders.log.histories import FAILED, append, claimed, forked, spec, step, submitted
from tests.builders.log.specs import FACTS, LEASE, SHAPE

SILENT = 30_000_000


def drive(log: Store, planned: int = 1000) -> str:
    """A run that a daemon drives. Returns its id."""
    of = spec(steps=planned)
    submit_all(log, CONTEXT, [Wish(of, Preflight(SHAPE, FACTS, None, planned, []))], "ada")
    found = attempts.claim(log, CONTEXT, daemon="d", host="h", fits=lambda run: True, lease_micros=LEASE)
    assert found is not None
    return found.lease.run_id


def register(log: Store) -> None:
    with log.write(appends=False) as tx:
        now = CONTEXT.now()
        daemons.register(tx, DaemonRow("d", "node-1", 1, 1.0, "/h", '{"gpus": 4, "cpus": 2}', now, now))


def observer(log: Store) -> Observer:
    return Observer(log, CONTEXT, Limits(), SILENT)


def test_a_board_shows_what_runs_what_waits_and_what_failed(log: Store) -> None:
    register(log)
    run = drive(log)
    watching = observer(log)
    [line] = watching.look().runs
    assert (line.losses, line.tokens_per_second, line.run.status) == ([], None, "starting")
    append(
        log,
        run,
        [step(1, 4.0), step(2, 2.0), FAILED, *claimed(from_step=1)[:1], step(2, 3.0)],
        at=CONTEXT.now(),
    )
    waiting = submit_all(log, CONTEXT, [Wish(spec(), Preflight(SHAPE, FACTS, None, 3, []))], "bob")[0]
    board = watching.look()
    [line] = board.runs
    assert line.losses == [4.0, 3.0], "the second attempt drew step 2 anew"
    assert (line.tokens_per_second, line.mfu, line.memory) == (20.0, 0.5, 2_000_000)
    assert line.last is not None
    assert line.last.type == "AttemptClaimed"
    assert [row.run_id for row in board.queue if row.kind] == [waiting]
    assert [r.type for r in board.failures] == ["AttemptFailed"]
    for width, height in ((80, 24), (140, 40), (40, 12), (80, 4)):
        lines = board_lines(board, width, height)
        assert len(lines) <= height
        assert max(line.cell_len for line in lines) <= width
    text = "\n".join(line.plain for line in board_lines(board, 80, 24))
    for said in (
        run,
        waiting,
        "2/1000",
        "loss 3.0000",
        "20 tokens/s",
        "MFU 50.0%",
        "2 MiB",
        "of 4 GPUs used",
        "boom",
    ):
        assert said in text
    assert observer(log).look().runs[0].losses == line.losses, "a look from the beginning shows the same"


def test_a_screen_holds_many_runs(log: Store) -> None:
    names = [drive(log) for _ in range(25)]
    board = observer(log).look()
    lines = [line.plain for line in board_lines(board, 80, 24)]
    assert len(lines) <= 24
    assert any("more run" in line for line in lines)
    every = "\n".join(line.plain for line in board_lines(board, 80, None))
    assert all(name in every for name in names)


def test_the_board_of_a_run_reads_its_curve_in_pages(log: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = drive(log, 30)
    append(log, run, [step(n, 1 / n) for n in range(1, 31)], at=CONTEXT.now())
    monkeypatch.setattr("sftd.operations.queries.board._PAGE", 20)
    watching = RunObserver(log, CONTEXT, Limits(), SILENT, run[:-2])
    first, second = watching.look(), watching.look()
    # The submission and the claim are events, too.
    assert (first.is_complete, first.ledger) == (False, None)
    assert (second.is_complete, len(second.history.curves)) == (True, 30)
    assert second.ledger is not None
    for width, height in ((80, 24), (140, 40), (30, 8)):
        lines = run_lines(second, width, height)
        assert len(lines) <= height
        assert max(line.cell_len for line in lines) <= width
    assert "30/30" in lines[1].plain


def test_a_forks_few_steps_are_all_drawn_and_a_slow_one_counts_for_its_time(log: Store) -> None:
    start = [forked("gone", 100_000), submitted(spec(steps=101_000)), *claimed(from_step=100_000)]
    # Up and down by turns: a mean over several steps would be a line.
    later = [step(100_000 + n, 1.0 + n % 2) for n in range(1, 41)]
    append(log, "fork", [*start, *later, step(100_041, seconds=11.0, mfu=0.1)])
    seen = RunObserver(log, CONTEXT, Limits(), SILENT, "fork").look()
    text = "\n".join(line.plain for line in run_lines(seen, 80, 30))
    assert "2.0000" in text
    assert "1.0000" in text
    assert seen.line.mfu == pytest.approx((9 * 0.5 + 11 * 0.1) / 20)


def test_what_is_not_finite_and_what_is_not_printable_is_shown(log: Store) -> None:
    run = drive(log)
    nasty = e.AttemptFailed(cause="crash", message="\x1b[2Jgone\nnext", exit_code=1)
    sources = {name: e.SourceFigures(rows=1, tokens=1, loss=math.nan) for name in ("a\x1b[2J", "b")}
    last = step(3, math.inf, token_accuracy=0.375, entropy=math.nan, sources=sources)
    append(log, run, [step(1, math.nan), step(2, 1.0), last, nasty], at=CONTEXT.now())
    one = RunObserver(log, CONTEXT, Limits(), SILENT, run).look()
    of_run = "\n".join(line.plain for line in run_lines(one, 120, 40))
    assert "\x1b" not in of_run
    assert "accuracy 37.5%" in of_run
    assert "loss by source  a [2J nan  b nan" in of_run
    board = observer(log).look()
    text = "\n".join(line.plain for line in board_lines(board, 120, 40))
    assert "\x1b" not in text
    assert "gone next" in text


@contextmanager
def statements(log: Store) -> Iterator[list[tuple[str, Any]]]:
    """What is asked of the database meanwhile."""
    found: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            found.append((statement, parameters))

    sa.event.listen(log.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(log.engine, "before_cursor_execute", note)


def test_a_look_does_not_cost_more_the_longer_the_log_is(log: Store) -> None:
    if log.engine.dialect.name != "sqlite":
        pytest.skip("a planner that judges by statistics scans a small table whatever its indexes")
    run = drive(log, 5000)
    append(log, run, [step(n) for n in range(1, 50)], at=CONTEXT.now())
    for watching in (observer(log), RunObserver(log, CONTEXT, Limits(), SILENT, run)):
        watching.look()
        append(log, run, [step(50)], at=CONTEXT.now())
        with statements(log) as asked:
            watching.look()
        plans = []
        with log.engine.connect() as connection:
            for statement, parameters in asked:
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                plans += [
                    (row[-1], statement) for row in plan if "events" in statement or "view_runs" in statement
                ]
        assert len(plans) >= 4
        for step_of_plan, statement in plans:
            assert not step_of_plan.startswith(("SCAN events", "SCAN view_runs")), statement
            assert "TEMP B-TREE" not in step_of_plan or "queue" in statement, statement


@pytest.fixture
def away(log: Store, database_url: str, request: pytest.FixtureRequest) -> Callable[[bool], None]:
    """Takes the database away, and gives it back."""
    if log.engine.dialect.name == "sqlite":
        path = Path(database_url.removeprefix("sqlite:///"))

        def move(gone: bool) -> None:
            for name in ("", "-wal", "-shm"):
                here, there = Path(f"{path}{name}"), Path(f"{path}.away{name}")
                if (here if gone else there).exists():
                    shutil.move(*((here, there) if gone else (there, here)))

        return move
    server = request.getfixturevalue("postgres_server")
    name = sa.make_url(database_url).database

    def refuse(gone: bool) -> None:
        engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {str(not gone).lower()}")
            if gone:
                ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %(name)s"
                connection.exec_driver_sql(ended, {"name": name})

    return refuse


def test_a_database_that_goes_away_is_noticed_and_seen_again(
    log: Store, away: Callable[[bool], None]
) -> None:
    run = drive(log)
    append(log, run, [step(1)], at=CONTEXT.now())
    watching = observer(log)
    assert watching.look().runs[0].losses == [1.0]
    away(True)
    try:
        for _ in range(2):
            with pytest.raises((SftdError, sa.exc.SQLAlchemyError)):
                watching.look()
    finally:
        away(False)
    assert watching.look().runs[0].losses == [1.0]
    append(log, run, [step(2, 0.5)], at=CONTEXT.now())
    assert watching.look().runs[0].losses == [1.0, 0.5]


def test_a_board_is_json(
    log: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(log)
    run = drive(log)
    append(log, run, [step(1), FAILED, *claimed()[:1]], at=CONTEXT.now())
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    submit_all(log, CONTEXT, [Wish(spec(), Preflight(SHAPE, FACTS, None, 3, []))], "bob")
    board = json.loads(CliRunner().invoke(main, ["watch", "--json"], catch_exceptions=False).stdout)
    for part, command in (("nodes", "nodes"), ("waiting", "queue")):
        alone = json.loads(CliRunner().invoke(main, [command, "--json"], catch_exceptions=False).stdout)
        for found in (*board[part], *alone):
            # Time passes while both are asked.
            found.pop("unseen_seconds", None)
            assert isinstance(found.pop("starts_at", None), str | None)
        assert board[part] == [found for found in alone if part == "nodes" or found["kind"]]
    assert [found["run_id"] for found in board["runs"]] == [run]
    assert [found["what"] for found in board["failures"]] == ["crash: boom"]
    one = json.loads(CliRunner().invoke(main, ["watch", run, "--json"], catch_exceptions=False).stdout)
    assert (one["losses"], one["step"], one["last"]["type"]) == ([1.0], 0, "AttemptClaimed")
    for arguments in (["watch"], ["watch", run], ["watch", "--once"]):
        # Where nobody watches, it is printed once.
        shown = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert run in shown.stdout
        assert "\x1b" not in shown.stdout
        assert max(map(len, shown.stdout.splitlines())) <= 120, "a pipe has no edge, but a board has a width"


def test_names_of_runs_are_found_without_sqlalchemy(log: Store, database_url: str, tmp_path: Path) -> None:
    for name in ("brave-one", "brave-two", "br%", "calm"):
        append(log, name, [submitted(spec())])
    assert sorted(run_names(database_url, "brave", 10)) == [("brave-one", "queued"), ("brave-two", "queued")]
    assert run_names(database_url, "br%", 10) == [("br%", "queued")]
    assert len(run_names(database_url, "", 3)) == 3
    for name in ("brave-name", "brave name"):
        append(
            log,
            f"other-{name[5]}",
            [submitted(spec(name=name)), e.SweepJoined(sweep="brave-sweep", values={})],
        )
    more = [("brave-name", "name"), ("brave-sweep", "sweep")]
    assert run_names(database_url, "brave", 10)[2:] == more
    assert len(run_names(database_url, "", 9)) == 6
    assert run_names(f"sqlite:///{tmp_path}/none.db", "", 3) == []
    assert not (tmp_path / "none.db").exists()
    assert run_names("postgresql+psycopg://someone@127.0.0.1:1/none", "", 3) == []
