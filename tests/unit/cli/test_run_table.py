"""`sftd ls` fits its terminal, and cuts nothing that a person chose."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from sftd.cli.terminal import output
from sftd.cli.terminal.run_table import COLUMNS, SORTS, STATUSES, runs_table
from sftd.domain.run.state import Status
from sftd.operations.queries.runs import RunRow

HOUR = 3_600_000_000


def row(number: int, **changes: Any) -> RunRow:
    values: dict[str, Any] = {
        "run_id": f"clever-panda-76a{number}",
        "status": "succeeded",
        "project": "default",
        "name": f"baseline {number}",
        "user": "ada",
        "submitted_at": number * HOUR,
        "started_at": number * HOUR,
        "ended_at": number * HOUR + 49_000_000,
        "attempt": 1,
        "step": 10,
        "planned_steps": 1000,
        "loss": "9.85071",
        "val_loss": "9.89912",
        "seconds_per_step": 0.5,
        "anomalies": 0,
        "message": None,
        "sweep": None,
        "changed": None,
        "bytes": 0,
    }
    return RunRow(**values | changes)


def member(number: int, lr: str, project: str = "geo-bot") -> RunRow:
    changed = f'{{"optimizer.lr":{lr}}}'
    return row(number, project=project, name=f"sweep-3aea38 lr {lr}", sweep="sweep-3aea38", changed=changed)


def table(*rows: RunRow, width: int = 80, **options: Any) -> list[str]:
    return list(runs_table(rows, 9 * HOUR, width, colour=False, **options))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_names_are_wrapped_and_never_cut(width: int) -> None:
    name = "a rather long name of an experiment that somebody chose with care and wants to read"
    lines = table(row(1, project="geo-bot", name=name), member(2, "1e-3"), row(3), width=width)
    shown = " ".join(re.split(r"\s{2,}", line)[0] for line in lines)
    for word in [*f"geo-bot/{name}".split()[1:], "lr 1e-3", "sweep-3aea38", "baseline 3"]:
        assert word in shown or width < 60
    assert "".join(word for word in name if word != " ") in shown.replace(" ", "")
    assert max(map(len, lines)) <= max(width, 60)
    assert ("took" in lines[0], "try" in lines[0]) == (width >= 100, width >= 120)


def test_values_of_a_sweep_come_first() -> None:
    lines = table(member(1, "1e-3"), member(2, "5e-6", project="default"), width=100)
    assert lines[1].startswith("lr 1e-3 · geo-bot/sweep-3aea38  clever-panda-76a1  succeeded  10/1000")
    assert lines[2].startswith("lr 5e-6 · sweep-3aea38          clever-panda-76a2")
    named = row(1, name="first lr 1e-3", sweep="sweep-3aea38", changed='{"optimizer.lr":0.001}')
    assert table(named)[1].startswith("first lr 1e-3  clever-panda")
    # Older names were cut: then the values themselves are shown.
    paths = '{"data.train_files":["/a/b"],"model.partial_pretrain":"/m/llama"}'
    bare = row(1, name="sweep-3aea38", sweep="sweep-3aea38", changed=paths)
    assert table(bare, width=160)[1].startswith(
        'train_files ["/a/b"], partial_pretrain llama · sweep-3aea38  '
    )


def test_columns_without_a_word_are_left_out() -> None:
    lines = table(row(1, name="", val_loss=None, loss=None, attempt=0, ended_at=None))
    assert lines[0].split() == ["run", "status", "step", "age"]
    assert lines[1].split() == ["clever-panda-76a1", "succeeded", "10/1000", "8h"]


def test_a_failure_is_told_below_its_run() -> None:
    lines = table(row(1, status="failed", message="crash: " + "x" * 100), width=60)
    assert lines[2] == "  crash: " + "x" * 50 + "…"
    assert len(lines[2]) == 60


def test_columns_that_are_asked_for_are_all_shown() -> None:
    lines = table(row(1, message="m"), columns=COLUMNS, width=500)
    assert lines[0].split() == list(COLUMNS)
    lines = table(row(1, name="one two three four five"), columns=("run", "name"), width=30)
    assert [line.split() for line in lines[1:]] == [
        ["clever-panda-76a1", "one", "two"],
        ["three", "four"],
        ["five"],
    ]


@pytest.mark.parametrize("key", list(SORTS))
def test_runs_without_a_figure_come_last(key: str) -> None:
    rows = [
        row(1, val_loss=None, loss=None, ended_at=None, status="queued", step=0),
        row(2, val_loss="NaN", loss="NaN"),
        row(3, val_loss="1.5", loss="1.5", step=20),
    ]
    order = [found.run_id[-1] for found in sorted(rows, key=SORTS[key])]
    expected = {"age": "321", "name": "123", "status": "123", "size": "123", "loss": "312", "val": "312"}
    assert "".join(order) == expected.get(key, "321" if key == "step" else "231")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5, "0s"),
        (59, "59s"),
        (3599, "59m"),
        (3600, "1h"),
        (90_000, "1d"),
        (9 * 86_400, "9d"),
        (15 * 86_400, "2w"),
    ],
)
def test_an_age_has_one_unit(seconds: int, shown: str) -> None:
    assert output.age(seconds * 1_000_000) == shown


def test_every_status_has_a_style_in_the_order_of_a_runs_life() -> None:
    assert get_args(Status) == STATUSES


def test_a_coloured_table_has_the_text_of_the_plain_one() -> None:
    rows = [row(1), row(2, status="failed")]
    plain, coloured = (list(runs_table(rows, 10 * HOUR, 80, colour=colour)) for colour in (False, True))
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in coloured] == plain
    assert coloured[0].startswith("\x1b[2m"), "the head is dim, whatever a column's colour"
    assert coloured[0].count("\x1b") == 2
