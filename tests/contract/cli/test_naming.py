"""Runs are found by id, by a beginning of it, by the name that a person gave, and by their sweep."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from sftd.cli import main
from sftd.domain.errors import AmbiguousRun, Refused, RunNotFound
from sftd.domain.log import events as e
from sftd.operations.queries import resolve, runs
from sftd.operations.queries.runs import Filter
from sftd.projections import verify, views
from sftd.store.database.engine import Store
from sftd.store.queries.resolve import resolve_ids
from tests.builders.log.histories import (
    FAILED,
    NOON,
    SECOND,
    SUCCEEDED,
    append,
    claimed,
    forked,
    published,
    spec,
    step,
    submitted,
)
from tests.builders.log.view_rows import view_rows

SWEEP = "sweep-3aea38"
CHANGES = {"hold": "held", "release": "queued", "cancel": "cancelled"}


@pytest.fixture
def log(database_url: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two runs named `baseline`, the newer one still queued; a sweep of three; a fork; a run with a name like an id."""
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    monkeypatch.setenv("COLUMNS", "80")
    store = Store(store.engine, before_commit=(views.catch_up,))
    ended = [*claimed(), step(1), SUCCEEDED]
    append(store, "brave-otter-0001", [submitted(spec(name="baseline")), *ended])
    append(store, "brave-otter-0002", [submitted(spec(name="baseline"))], at=NOON + 100 * SECOND)
    for number, (lr, val) in enumerate(((1e-3, 2.5), (1e-4, 1.5), (1e-5, float("nan")))):
        joined = e.SweepJoined(sweep=SWEEP, values={"optimizer.lr": lr})
        first = [submitted(spec(name=f"{SWEEP} lr {lr:g}", lr=lr)), joined]
        validated = e.ValidationCompleted(step=1, loss=val, tokens=10, rows=1, seconds=1.0)
        more = [*claimed(), step(1), validated, SUCCEEDED] if number < 2 else []
        append(store, f"calm-heron-000{number}", [*first, *more], at=NOON + (200 + number) * SECOND)
    append(store, "eager-fox-0001", [submitted(spec(name="geo")), *claimed(), step(1), published(1)])
    changed = forked("eager-fox-0001", 1)
    changed.changes["optimizer.lr"] = [1e-4, 5e-6]
    append(store, "eager-fox-0002", [changed, submitted(spec(name="geo", lr=5e-6))], at=NOON + 300 * SECOND)
    append(store, "zesty-yak-0001", [submitted(spec(name="brave")), *claimed(), FAILED])
    return store


def sftd(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    ("text", "run_id"),
    [
        ("calm-heron-0001", "calm-heron-0001"),
        ("eager-fox-0002", "eager-fox-0002"),
        ("zesty", "zesty-yak-0001"),
        ("baseline", "brave-otter-0002"),
        ("default/baseline", "brave-otter-0002"),
        ("geo", "eager-fox-0002"),
        (f"{SWEEP} lr 0.0001", "calm-heron-0001"),
        # A whole name wins over the beginning of an id.
        ("brave", "zesty-yak-0001"),
    ],
)
def test_a_reading_command_finds_the_newest_of_a_name(log: Store, text: str, run_id: str) -> None:
    found, remark = resolve.one(log, text)
    assert found == run_id
    assert bool(remark) == (text.rpartition("/")[2] in ("baseline", "geo"))
    shown = sftd("checkpoints", text)
    assert shown.exit_code == 0
    assert shown.stderr.strip() == remark


@pytest.mark.parametrize("text", ["", "other/baseline", "base", "sweep", "sweep-", "BASELINE", "%"])
def test_what_names_no_run_is_refused(log: Store, text: str) -> None:
    with pytest.raises(RunNotFound):
        resolve.one(log, text)
    with pytest.raises(RunNotFound):
        resolve.several_to_change(log, text)


@pytest.mark.parametrize(
    "command",
    ["fork baseline", "gc baseline", "cancel geo", "mlflow register baseline m", "mlflow rebuild geo"],
)
def test_a_writing_command_refuses_a_name_of_several_runs(log: Store, command: str) -> None:
    before = runs.list_runs(log)
    done = sftd(*command.split())
    assert done.exit_code == 2
    assert "could be any of 2 runs" in done.stderr
    assert "fix: give the id of one run" in done.stderr
    assert runs.list_runs(log) == before


def test_only_runs_that_the_command_can_change_count(log: Store) -> None:
    assert sftd("hold", "baseline").stdout.startswith("brave-otter-0002 is held")
    assert sftd("pause", "geo").stdout.startswith("eager-fox-0001 will checkpoint")
    assert sftd("cancel", "brave-otter").stdout.startswith("brave-otter-0002 is cancelled")
    with pytest.raises(AmbiguousRun, match=r"brave-otter-0002 \(cancelled\), brave-otter-0001 \(succeeded\)"):
        resolve.one_to_change(log, "brave-otter", {"running"})


def test_a_sweep_stands_for_its_runs(log: Store) -> None:
    members = [f"calm-heron-000{number}" for number in range(3)]
    assert resolve.several(log, ["geo", SWEEP])[0] == ["eager-fox-0002", *members]
    assert resolve.several(log, [members[1], SWEEP])[0] == [members[1], members[0], members[2]]
    with log.read() as connection:
        assert resolve_ids(connection, SWEEP) == members
    with pytest.raises(AmbiguousRun, match="is a sweep of 3 runs; this command takes one of them"):
        resolve.one(log, SWEEP)
    compared = json.loads(sftd("compare", SWEEP, "--json").stdout)
    assert [side["run_id"] for side in compared["runs"]] == members
    assert sftd("lineage", SWEEP).stdout.count("calm-heron") == 3


@pytest.mark.parametrize("command", list(CHANGES))
def test_a_sweep_is_changed_where_it_can_be(log: Store, command: str) -> None:
    if command == "release":
        sftd("hold", SWEEP)
    done = sftd(command, SWEEP)
    assert (done.exit_code, done.stdout.count("calm-heron-0002")) == (0, done.stdout.count("calm-heron"))
    rows = {row.run_id: row.status for row in runs.list_runs(log)}
    assert rows["calm-heron-0002"] == CHANGES[command]
    if command == "cancel":
        with pytest.raises(Refused, match="none of its 3 runs"):
            resolve.several_to_change(log, SWEEP, {"queued"})


def test_a_leaderboard_begins_with_the_best(log: Store) -> None:
    shown = sftd("show", SWEEP)
    assert shown.stdout.splitlines()[0].startswith(
        f"{SWEEP}: 3 runs of project default, by ada: 1 queued, 2 "
    )
    values = [line.split()[:3] for line in shown.stdout.splitlines()[3:]]
    assert values == [["lr", "0.0001", "1.5000"], ["lr", "0.001", "2.5000"], ["lr", "1e-05", "0/10"]]
    listed = json.loads(sftd("show", SWEEP, "--json").stdout)
    assert [row["run_id"][-1] for row in listed] == ["1", "0", "2"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["base*"], ["brave-otter-0002", "brave-otter-0001"]),
        (["BASE"], ["brave-otter-0002", "brave-otter-0001"]),
        (["*fox*", "-n", "1"], ["eager-fox-0002"]),
        (["default/geo"], ["eager-fox-0002", "eager-fox-0001"]),
        (["gao"], []),
        (["?????"], ["zesty-yak-0001"]),
        (["%"], []),
        (["_eo"], []),
        (["zesty", "eager-fox-0001"], ["eager-fox-0001", "zesty-yak-0001"]),
        ([SWEEP], ["calm-heron-0002", "calm-heron-0001", "calm-heron-0000"]),
        (["sweep*", "--sort", "val"], ["calm-heron-0001", "calm-heron-0000", "calm-heron-0002"]),
        (["--sweep", SWEEP, "-s", "queued"], ["calm-heron-0002"]),
        (["--sweep", "sweep"], []),
        (["--name", "fox"], []),
        (["--name", "br?ve"], ["zesty-yak-0001"]),
        (["--since", "2026-09-21T14:17:30+00:00"], ["eager-fox-0002"]),
    ],
)
def test_ls_finds(log: Store, arguments: list[str], found: list[str]) -> None:
    listed = json.loads(sftd("ls", "--json", *arguments).stdout)
    assert sorted(row["run_id"] for row in listed) == sorted(found)
    if "--sort" in arguments or SWEEP in arguments:
        assert [row["run_id"] for row in listed] == found
    if not found:
        shown = sftd("ls", *arguments)
        assert (shown.exit_code, shown.stdout) == (
            0,
            "No runs with these filters; there are 8 without them.\n",
        )


def test_ls_says_what_sets_a_run_apart(log: Store) -> None:
    rows = {row["run_id"]: row for row in json.loads(sftd("ls", "--json").stdout)}
    member, fork, other = rows["calm-heron-0001"], rows["eager-fox-0002"], rows["brave-otter-0001"]
    assert (member["sweep"], member["changed"]) == (SWEEP, {"optimizer.lr": 1e-4})
    assert (fork["sweep"], fork["changed"]) == ("", {"optimizer.lr": 5e-6})
    assert (other["sweep"], other["changed"]) == (None, {})
    lines = sftd("ls").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.partition("  ")[0] for line in lines]
    assert f"lr 0.0001 · {SWEEP}" in names
    assert "geo · lr 5e-06" in names
    assert lines[0].split()[:2] == ["name", "run"]


def test_the_view_is_what_the_log_says(log: Store) -> None:
    before = view_rows(log.engine.url)
    views.rebuild(log)
    assert view_rows(log.engine.url) == before
    assert verify.check_log(log, lambda done, total: None).problems[:1] == [
        "brave-otter-0001: is in the log, but has no row in the queue: no daemon will ever start it"
    ]
    with log.write() as tx:
        tx.connection.exec_driver_sql("UPDATE view_variants SET sweep = 'x' WHERE sweep <> ''")
    found = verify.check_log(log, lambda done, total: None).problems
    assert [p for p in found if p.startswith("view_variants, calm-heron-0000: sweep differ")]


@pytest.mark.parametrize("text", ["Übung", "Übung*", "*über?all", "ÜBUNG%"])
def test_capitals_beyond_ascii_are_found_as_they_are_written(log: Store, text: str) -> None:
    append(log, "calm-newt-0001", [submitted(spec(name="Übung über_all"))])
    found = runs.list_runs(log, Filter(patterns=(text,)))
    assert [row.run_id for row in found] == ([] if "%" in text else ["calm-newt-0001"])


def test_bytes_that_are_no_text_name_nothing(log: Store) -> None:
    for wanted in (Filter(patterns=("a\udcff",)), Filter(name="\udcff"), Filter(project="\udcff*")):
        assert runs.list_runs(log, wanted) == []


def test_filters_are_joined(log: Store) -> None:
    wanted = Filter(patterns=("baseline", "geo"), statuses=("succeeded",), project="default")
    assert [row.run_id for row in runs.list_runs(log, wanted)] == ["brave-otter-0001"]


def test_a_removed_run_is_in_nobodys_way(log: Store) -> None:
    append(log, "brave-otter-0001", [e.RunRemoved(by="me", freed_bytes=1)], at=NOON + 400 * SECOND)
    assert resolve.one(log, "brave-otter") == ("brave-otter-0002", "")
    assert resolve.one_to_change(log, "brave-otter") == "brave-otter-0002"
    assert resolve.one(log, "brave-otter-0001") == ("brave-otter-0001", "")
    append(log, "brave-otter-0002", [e.RunRemoved(by="me", freed_bytes=1)], at=NOON + 401 * SECOND)
    with pytest.raises(AmbiguousRun):
        resolve.one(log, "brave-otter")
    assert resolve.one(log, "brave-otter-0002") == ("brave-otter-0002", "")
