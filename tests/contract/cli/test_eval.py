"""`sftd eval` on a log, and where else its results are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from sftd.cli import main
from sftd.domain.log import events as e
from sftd.domain.spec.evaluation_section import CommandEvaluation, PromptsEvaluation
from sftd.operations.queries.runs import find_run
from sftd.store.database.engine import Store
from sftd.store.queue import leases
from tests.builders import json_fields
from tests.builders.log.histories import append, claimed, published, spec, step, submitted

RUN = "calm-heron-0001"
QUESTIONS = ["1+1?", "2+2?", "3+3?"]


def completed(at: int, answers: Path, texts: list[str], scores: list[float]) -> e.EvaluationCompleted:
    rows = {
        "question": [0, 1, 2],
        "prompt": QUESTIONS,
        "answer": texts,
        "reference": [["2"], ["4"], ["6"]],
        "score": scores,
    }
    pq.write_table(pa.table(rows), answers)
    return e.EvaluationCompleted(
        name="sums",
        step=at,
        kind="prompts",
        metrics={"exact_match": sum(scores) / 3},
        questions=3,
        questions_digest="q",
        manifest_digest="m",
        environment={},
        seconds=2.0,
        answers=str(answers),
    )


@pytest.fixture
def run(
    log: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """The command line on a run with results at steps 1 and 2, and one that waits."""
    evaluation = [
        PromptsEvaluation(name="sums", file="/q"),
        CommandEvaluation(name="other", argv=["x"], at_checkpoints=False),
    ]
    events: list[e.Event] = [
        submitted(msgspec.structs.replace(spec(steps=3), evaluation=evaluation)),
        *claimed(),
    ]
    for number in (1, 2, 3):
        events += [step(number), published(number)]
    events.append(completed(1, tmp_path / "1.parquet", ["2", "5", "7"], [1.0, 0.0, 0.0]))
    events.append(completed(2, tmp_path / "2.parquet", ["3", "4", "6"], [0.0, 1.0, 1.0]))
    append(log, RUN, events)
    with log.write() as tx:
        leases.enqueue(tx, RUN, 0, 1)
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", database_url)
    return lambda *arguments: CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_results_are_listed_and_shown(run: Callable[..., Result]) -> None:
    rows = json.loads(run("eval", RUN, "--list", "--json").stdout)
    for row in rows:
        json_fields.check("eval", row)
    assert [(row["name"], row["step"], row["status"]) for row in rows] == [
        ("sums", 1, "done"),
        ("sums", 2, "done"),
        ("sums", 3, "pending"),
    ]
    assert rows[1]["metrics"] == {"exact_match": pytest.approx(2 / 3)}
    shown = run("eval", RUN, "--list").stdout
    assert "exact_match 0.6667" in shown
    assert "waits for a daemon" in shown
    assert "sums: exact_match 0.6667 (step 2); pending at 3" in run("show", RUN).stdout
    assert "sums/exact_match 0.6667" in run("ls", "--columns", "run,metrics").stdout
    assert "sums/exact_match 0.6667 (step 2)" in run("watch", RUN, "--once").stdout
    assert "evaluation sums: exact_match 0.6667" in run("logs", RUN).stdout


def test_answers_are_compared_side_by_side(run: Callable[..., Result], log: Store, tmp_path: Path) -> None:
    said = run("eval", RUN, "sums", "--against", "1").stdout
    assert "3 questions, 2 better and 1 worse" in said
    assert "1+1?" in said
    rows = json.loads(run("eval", RUN, "sums", "--against", "1", "--json").stdout)
    json_fields.check("eval --against", rows[0])
    assert [(row["ours"], row["theirs"]) for row in rows] == [("3", "2"), ("4", "5"), ("6", "7")]
    # The same evaluation of the same run, by its name.
    assert "0 better and 0 worse" in run("eval", RUN, "sums", "--against", RUN).stdout
    other = msgspec.structs.replace(
        completed(2, tmp_path / "3.parquet", ["2", "4", "6"], [1.0, 1.0, 1.0]), questions_digest="other"
    )
    append(log, RUN, [e.EvaluationRequested(name="sums", step=2, by="ada"), other])
    refused = run("eval", RUN, "sums", "--against", "1")
    assert (refused.exit_code, "had other questions" in refused.stderr) == (2, True)
    refused = run("eval", RUN, "sums", "--step", "1", "--against", "nonsense")
    assert refused.exit_code == 2
    (tmp_path / "1.parquet").write_bytes(b"nonsense")
    refused = run("eval", RUN, "sums", "--against", "1", "--step", "1")
    assert (refused.exit_code, "cannot be read" in refused.stderr) == (2, True)


def test_what_is_requested_stays_queued_without_a_daemon_until_it_is_cancelled(
    run: Callable[..., Result], log: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftd.cli.steer import evaluate

    monkeypatch.setattr(evaluate, "_has_daemon", lambda settings: False)
    asked = json.loads(run("eval", RUN, "sums", "--step", "1", "--json").stdout)
    assert [(row["name"], row["step"], row["status"]) for row in asked] == [("sums", 1, "pending")]
    # The one that waits already is not requested again.
    before = find_run(log, RUN).version
    run("eval", RUN, "sums")
    assert find_run(log, RUN).version == before
    gone = json.loads(run("eval", RUN, "--cancel", "--json").stdout)
    assert [row["step"] for row in gone] == [1, 3]
    assert {x.step: x.status for x in find_run(log, RUN).evaluations} == {1: "failed", 2: "done", 3: "failed"}
    unknown: Any = run("eval", RUN, "nonsense")
    assert (unknown.exit_code, "use sums, other" in unknown.stderr) == (2, True)
