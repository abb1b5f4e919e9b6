"""What `sftd show` and `sftd checkpoints` claim of a run: that redone steps equal the log, how exactly, and what is kept.

The claims are what a person trusts without a look at the log, so each is compared with a history that does not support it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from sftd.cli import main
from sftd.domain.log import events as e
from sftd.domain.repro.steps import REDONE_DIFFERS
from sftd.store.database.engine import Store
from tests.builders.log.histories import append, claimed, open_log, published, spec, step, submitted

Show = Callable[[str], dict[str, str]]
VALIDATIONS = [
    e.ValidationCompleted(step=number, loss=loss, tokens=1, rows=1, seconds=1.0)
    for number, loss in ((1, 3.5), (2, 2.5), (3, 2.75))
]
# A log that was imported may have any name.
SOURCES = {
    "do[bold]cs\n\x1b": e.SourceFigures(rows=3, tokens=2, loss=1.25),
    "math": e.SourceFigures(rows=1, tokens=1, loss=math.nan),
}


@pytest.fixture
def log(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shutil.copyfile(sqlite_template, tmp_path / "sftd.db")
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return open_log(f"sqlite:///{tmp_path}/sftd.db")


@pytest.fixture
def show(log: Store) -> Show:
    """The facts that `sftd show` prints of a run, by their names."""

    def facts(run_id: str) -> dict[str, str]:
        log.engine.dispose()
        shown = CliRunner().invoke(main, ["show", run_id], catch_exceptions=False).stdout
        return dict(re.findall(r"^(\w[\w ]*?)  +(\S.*?) *$", shown.partition("\n\n")[0], re.MULTILINE))

    return facts


def redone(log: Store, run_id: str, *more: e.Event, **environment: object) -> None:
    """Two steps, of which the second is computed again."""
    append(log, run_id, [submitted(spec()), *claimed(**environment), step(1), published(1), step(2)])
    failed = e.AttemptFailed(cause="killed", message="gone", exit_code=None)
    append(log, run_id, [failed, *claimed(from_step=1, **environment), step(2), *more], attempt=2)


def test_bit_for_bit_is_claimed_only_of_what_was_compared_so(log: Store, show: Show) -> None:
    redone(log, "exact")
    redone(log, "loose", deterministic=False)
    odd = e.AnomalyDetected(step=2, what=REDONE_DIFFERS, detail={"loss": {"recorded": 1.0, "redone": 2.0}})
    redone(log, "odd", odd)
    # An anomaly of another kind says nothing of the steps' equality.
    redone(log, "spike", e.AnomalyDetected(step=2, what="loss_spike"))
    redone(log, "skipped", e.SamplesSkipped(step=1, sample=40, reason="loss_spike"))
    append(log, "once", [submitted(spec()), *claimed(), step(1), step(2)])
    assert {name: show(name).get("redone steps") for name in ("exact", "loose", "odd", "spike")} == {
        "exact": "1 (all match the log bit for bit)",
        "loose": "1 (all match the log to within rounding)",
        "odd": "1 (1 differ from the log)",
        "spike": "1 (all match the log bit for bit)",
    }
    assert show("skipped")["redone steps"] == "1 (all with the same samples match the log bit for bit)"
    assert "redone steps" not in show("once")
    assert [show(name).get("anomalies") for name in ("exact", "odd")] == [None, "1"]


def test_the_last_verification_is_what_came_of_it(log: Store, show: Show) -> None:
    verified = e.ReplayVerified(from_step=0, to_step=2, is_exact=True, environment={}, by="ada")
    diverged = e.ReplayDiverged(from_step=0, to_step=2, step=2, detail={}, environment={}, by="ada")
    for name, outcomes in {"good": [diverged, verified], "bad": [verified, diverged], "none": []}.items():
        append(log, name, [submitted(spec()), *claimed(), step(1), step(2), *outcomes])
    assert show("good")["last verified"].startswith("steps 1 to 2, ")
    assert show("good")["last verified"].endswith(": matched the log")
    assert show("bad")["last verified"].endswith(": diverged at step 2")
    assert "last verified" not in show("none")


def test_the_numbers_of_a_run_have_their_own_names(log: Store, show: Show) -> None:
    steps: list[e.Event] = []
    for number, validation in enumerate(VALIDATIONS, 1):
        figures = {"token_accuracy": number / 8, "entropy": 1.5, "sources": SOURCES}
        steps += [step(number, 10.0 / number, tokens=number, seconds=2.0, **figures), validation]
    append(log, "run", [submitted(spec(steps=10, name="mine")), *claimed(), *steps, published(3)])
    facts = show("run")
    assert (facts["name"], facts["project"], facts["status"]) == ("mine", "default", "running")
    assert facts["validation"] == "first 3.5000 (step 1), best 2.5000 (step 2), last 2.7500 (step 3)"
    # Seven steps of two seconds are left; 20 tokens of a step are not padding.
    assert facts["steps"] == "3 of 10, 14s left, 10 tokens/s"
    assert facts["loss"] == "3.3333"
    assert facts["last step"] == "accuracy 37.5%, perplexity 28.03, entropy 1.500 nats"
    assert facts["by source"] == "do[bold]cs  : loss 1.2500, 3 rows, 2 tokens"
    assert "last validation" not in facts
    assert facts["tokens"] == "6 trained"
    assert facts["disk"] == "1 B in 1 checkpoint, 1 of them missing here"
    assert facts["submitted"].endswith(" by ada")


def test_a_checkpoint_has_the_status_that_the_log_and_the_disk_give_it(log: Store, tmp_path: Path) -> None:
    def save(number: int, suffix: str = "") -> str:
        folder = tmp_path / f"step-{number:08d}{suffix}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"run_id": "run", "layout": {"tp": 2}}))
        return str(folder)

    paths = {number: save(number) for number in range(1, 8)}
    steps = [
        event
        for number, path in paths.items()
        for event in (step(number), msgspec.structs.replace(published(number), path=path))
    ]
    fates: list[e.Event] = [
        e.CheckpointPinned(step=2, fork="fork"),
        e.CheckpointRejected(step=4, path=paths[4], reason="damaged"),
        e.CheckpointDeleted(step=5, path=paths[5], bytes=1, reason="retention"),
        e.CheckpointReduced(
            step=6,
            path=save(6, ".weights"),
            former_path=paths[6],
            bytes=1,
            freed_bytes=1,
            manifest_digest="w",
        ),
        e.AttemptFailed(cause="killed", message="gone", exit_code=None),
    ]
    append(log, "run", [submitted(spec()), *claimed(), *steps, *fates])
    append(log, "run", claimed(from_step=6), attempt=2)
    shutil.rmtree(paths[3])
    log.engine.dispose()
    rows = json.loads(CliRunner().invoke(main, ["checkpoints", "run", "--json"]).stdout)
    assert {row["step"]: row["status"] for row in rows} == {
        1: "published",
        2: "pinned",
        3: "missing",
        4: "rejected",
        5: "deleted",
        6: "weights",
        7: "superseded",
    }
    assert {row["step"] for row in rows if row["layout"] == {"tp": 2}} == {1, 2, 6, 7}
