"""`sftd compare` on a real database: forks, runs of every length, and what is printed of them."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from sftd.cli import main
from sftd.domain.errors import Refused
from sftd.domain.log import events as e
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.sections import Trainer
from sftd.operations.queries import compare
from sftd.store.database.engine import Store
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

NOW = NOON + 100_000 * SECOND


def losses(count: int, first: int = 1, by: float = 1.0) -> list[e.Event]:
    return [step(n, by / n, lr=1e-4 * by) for n in range(first, first + count)]


def tell(log: Store) -> None:
    """A run that crashed and went on, its fork, a run of one step, one that waits, and one that runs on."""
    validation = e.ValidationCompleted(step=6, loss=0.25, tokens=1, rows=1, seconds=1.0)
    before = [
        submitted(spec(name="one")),
        *claimed(),
        *losses(6),
        published(6),
        validation,
        step(7, 99.0),
        FAILED,
    ]
    again = [*claimed(from_step=6), *losses(4, 7), published(10, "m10"), SUCCEEDED]
    append(log, "parent", before)
    append(log, "parent", again, attempt=2)
    start = [forked("parent", 6), submitted(spec(lr=5e-4, steps=12), digest="e" * 64)]
    append(log, "fork", [*start, *claimed(from_step=6, torch="2.10"), *losses(6, 7, by=2.0), SUCCEEDED])
    append(log, "short", [submitted(spec()), *claimed(devices=1), step(1, 1.0), SUCCEEDED])
    append(log, "waits", [submitted(spec())])
    append(log, "going", [submitted(spec()), *claimed(), *losses(3)])


def test_a_forks_curve_begins_with_its_parents_as_it_was_then(log: Store) -> None:
    tell(log)
    found = compare.compare(log, ["parent", "fork"], NOW, price=3.0)
    parent, fork = found.sides
    assert list(parent.curves.columns["loss"]) == [1 / n for n in range(1, 11)], (
        "step 7 is the second attempt's"
    )
    assert list(fork.curves.columns["loss"]) == [
        *(1 / n for n in range(1, 7)),
        *(2 / n for n in range(7, 13)),
    ]
    assert parent.curves.validations == {6: 0.25}
    assert fork.curves.validations == {}, "it was made behind the checkpoint"
    [parting] = found.partings
    assert (parting.other, parting.first, parting.last) == ("fork", 1, 10)
    assert parting.bits == {"lr": 7, "loss": 7}
    assert (parting.at, parting.beyond_rounding) == (7, 7)
    assert {(d.group, d.key): d.values for d in found.differences} == {
        ("config", "optimizer.lr"): [1e-4, 5e-4],
        ("config", "trainer.max_steps"): [10, 12],
        ("data", "training data (sha256)"): ["d" * 16, "e" * 16],
        ("environment", "torch"): ["2.11", "2.10"],
    }
    one, two = parent.figures, fork.figures
    assert (two.parent, two.inherited_steps, two.tokens) == ("parent", 6, 120)
    assert (one.lowest_loss, one.lowest_loss_step, one.tail_loss) == (0.1, 10, 0.1)
    assert (one.best_val_loss, one.best_val_step, one.mfu) == (0.25, 6, 0.5)
    assert one.tokens_per_second == 20.0
    # Attempts of 12 s and 8 s on two devices.
    assert one.device_hours == pytest.approx(2 * (12 + 8) / 3600)
    assert one.cost == pytest.approx(3 * one.device_hours)


def test_the_parents_steps_count_as_they_were_when_it_was_forked(log: Store) -> None:
    append(log, "parent", [submitted(spec()), *claimed(), *losses(4), published(2, "first")])
    append(
        log, "fork", [forked("parent", 2, "first"), submitted(spec()), *claimed(from_step=2), step(3, 5.0)]
    )
    # Then the parent goes back, and its steps differ.
    append(log, "parent", [FAILED, *claimed(), *losses(3, by=7.0)], attempt=2)
    found = compare.compare(log, ["fork", "parent"], NOW)
    assert list(found.sides[0].curves.columns["loss"]) == [1.0, 0.5, 5.0]
    assert list(found.sides[1].curves.columns["loss"]) == [7.0, 3.5, 7 / 3]


def test_a_run_that_went_back_has_the_loss_of_the_step_that_it_is_at(log: Store) -> None:
    append(log, "back", [submitted(spec()), *claimed(), *losses(3), published(3), *losses(3, 4), FAILED])
    append(log, "back", claimed(from_step=3), attempt=2)
    append(log, "slow", [submitted(spec()), *claimed(), step(1, seconds=9.0, mfu=0.1), step(2)])
    back, slow = (side.figures for side in compare.compare(log, ["back", "slow"], NOW).sides)
    assert (back.step, back.loss, back.lowest_loss) == (3, 1 / 3, 1 / 3)
    # As long as the slow step took, the devices did so little.
    assert slow.mfu == pytest.approx((9 * 0.1 + 1 * 0.5) / 10)


def test_a_parent_that_is_not_in_this_database_is_left_out(log: Store) -> None:
    append(log, "fork", [forked("elsewhere", 6), submitted(spec()), *claimed(from_step=6), *losses(2, 7)])
    append(log, "other", [submitted(spec()), *claimed(), *losses(8)])
    found = compare.compare(log, ["fork", "other"], NOW)
    assert (found.sides[0].curves.first, found.sides[0].curves.last) == (7, 8)
    assert (found.partings[0].first, found.partings[0].steps, found.partings[0].bits) == (7, 2, {})


@pytest.mark.parametrize(
    "runs", [["waits", "short"], ["short", "going", "parent", "waits", "fork"], ["waits", "fork"]]
)
def test_runs_of_every_length_are_compared(
    log: Store, database_url: str, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(log)
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    monkeypatch.setenv("SFTD_DEVICE_PRICE", "2")
    monkeypatch.setenv("COLUMNS", "100")
    shown = CliRunner().invoke(main, ["compare", *runs], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    for run in runs:
        assert run in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    answer = json.loads(CliRunner().invoke(main, ["compare", *runs, "--json"]).stdout)
    assert [run["run_id"] for run in answer["runs"]] == runs
    assert len(answer["partings"]) == len(runs) - 1
    assert all(run["cost"] == pytest.approx(2 * run["device_hours"]) for run in answer["runs"])
    # What runs on costs until now, what has ended until its end.
    hours = {run["run_id"]: run["device_hours"] for run in answer["runs"]}
    assert "going" not in hours or hours["going"] > 1000 * hours["short"]


@pytest.mark.parametrize("charset", ["utf-8", "ascii"])
def test_what_a_config_says_does_nothing_to_a_terminal_or_a_page(
    log: Store, database_url: str, charset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty = "[/red]\x1b[2J</script><img src=http://x.test/><!--DATA--> é"
    append(log, "plain", [submitted(spec()), *claimed(), *losses(3)])
    of = msgspec.structs.replace(spec(), data=Data(train_files=[nasty]))
    failed = e.RunFailed(cause="crash", message=nasty)
    append(log, "nasty", [submitted(of), *claimed(), *losses(3, by=2.0), failed])
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    monkeypatch.setenv("COLUMNS", "400")
    shown = CliRunner(charset=charset).invoke(main, ["compare", "plain", "nasty"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.stdout
    assert shown.stdout.count("[/red] [2J</script><img src=http://x.test/><!--DATA--> ") == 2
    page = page_of(log, ["plain", "nasty"])
    assert page.asked == []
    assert page.tags.count("script") == 2


class Page(html.parser.HTMLParser):
    """What a page asks for, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.data: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def page_of(log: Store, runs: list[str]) -> Page:
    from sftd.cli.compare.page import render

    return Page(render(compare.compare(log, runs, NOW), 500))


def test_what_is_not_set_is_not_said_to_be_untold(
    log: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_epochs = msgspec.structs.replace(spec(), trainer=Trainer(epochs=1))
    append(log, "epochs", [submitted(by_epochs), *claimed(OMP_NUM_THREADS=None, cuda="12.9"), SUCCEEDED])
    append(log, "steps", [submitted(spec()), *claimed(OMP_NUM_THREADS="1", cuda="13.0"), SUCCEEDED])
    append(log, "older", [submitted(spec()), *claimed(), SUCCEEDED])
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    asked = ["compare", "epochs", "steps", "older"]
    shown = CliRunner().invoke(main, asked, env={"COLUMNS": "120"}, catch_exceptions=False).stdout
    rows = {cells[1]: cells[2:] for cells in map(str.split, shown.splitlines()) if len(cells) > 4}
    assert rows["trainer.max_steps"] == ["not", "set", "10", "10"]
    assert rows["OMP_NUM_THREADS"] == ["not", "set", "1", "not", "recorded"]
    assert rows["cuda"] == ["12.9", "13.0", "not", "recorded"]
    page = tmp_path / "c.html"
    CliRunner().invoke(main, [*asked, "--html", str(page)], catch_exceptions=False)
    assert "<td>not set</td><td>10</td>" in page.read_text()


def test_a_page_holds_everything_and_asks_for_nothing(log: Store) -> None:
    tell(log)
    nasty = "</script><img src=x onerror=alert(1)>"
    append(log, nasty, [submitted(spec(name=nasty)), *claimed(), step(1, math.nan), step(2, 0.5)])
    page = page_of(log, ["parent", "fork", nasty])
    assert page.asked == []
    assert (page.tags.count("script"), page.tags.count("img")) == (2, 0)
    assert page.tags.count("svg") >= 3 + 3, "a key for each run, and the plots"
    data: dict[str, Any] = json.loads(page.data[_place(page, '{"runs"')])
    assert [run["id"] for run in data["runs"]] == ["parent", "fork", nasty]
    assert data["charts"]["loss"]["curves"][2] == [[1, 1, None, None, None, 1], [2, 2, 0.5, 0.5, 0.5, 0]]
    assert data["charts"]["validation"]["curves"][0] == [[6, 6, 0.25, 0.25, 0.25, 0]]


def _place(page: Page, begins: str) -> int:
    return next(n for n, text in enumerate(page.data) if text.startswith(begins))


def test_a_page_of_runs_without_a_step_says_so(log: Store) -> None:
    append(log, "a", [submitted(spec())])
    append(log, "b", [submitted(spec(lr=1.0))])
    assert "No run has recorded a step yet." in page_of(log, ["a", "b"]).data


def test_nothing_is_compared_with_itself(log: Store) -> None:
    tell(log)
    with pytest.raises(Refused, match="more than once"):
        compare.compare(log, ["parent", "fork", "par"], NOW)
