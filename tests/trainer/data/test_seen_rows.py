"""Which rows a step sees, computed again from the files: what training recorded, whatever the rows are like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.spec.spec import OrderStart
from sftd.launcher.tools import ToolFailed, run_tool
from sftd.trainer.data.sample_order import samples_digest

if TYPE_CHECKING:
    from sftd.wire.attempt.directory import AttemptDir
    from tests.builders.trainer.trainers import Run, Trainer


def ask(attempt: AttemptDir, *arguments: str) -> dict[str, Any]:
    return run_tool("seen_rows", [str(attempt.order_file), *arguments], lambda _: None)


def steps(attempt: AttemptDir, *numbers: int, text: bool = False) -> dict[int, dict[str, Any]]:
    """Step → what it sees."""
    order = attempt.order()
    positions = [str(order.sample_position(number - 1)) for number in numbers]
    return dict(zip(numbers, ask(attempt, "--at", *positions, *["--text"] * text)["seen"], strict=True))


def test_rows_are_those_that_training_recorded(base: Run) -> None:
    """Step 5 crosses the end of an epoch of 37 rows."""
    for number, seen in steps(base.attempt, 1, 5).items():
        recorded = base.steps()[number]
        assert (seen["samples_digest"], seen["tokens"]) == (recorded.samples_digest, recorded.tokens)
        epochs = [row["epoch"] for row in seen["rows"]]
        assert (epochs[0], epochs[-1]) == (0, number // 5)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of 3 and 4 rows: row 1 trains nothing, row 5 is too long, row 6 is padded."""
    long = list(range(40, 60))
    rows = [
        ([10, 11, 12], [-100, 11, 12]),
        ([13, 14, 15], [13, -100, -100]),
        ([16, 17], [-100, 17]),
        ([18, 19], [-100, 19]),
        ([20, 21], [-100, 21]),
        (long, [-100] * 10 + long[10:]),
        # Its first label is one that nothing predicts.
        ([22, 23, 24], [22, 23, 24]),
    ]
    paths = []
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        ids, masks, labels = [], [], []
        for row, trained in part:
            padding = [0, 0] if row[0] == 22 else []
            ids.append(row + padding)
            masks.append([1] * len(row) + padding)
            labels.append(trained + [-100 for _ in padding])
        table = pa.table({"input_ids": ids, "attention_mask": masks, "labels": labels})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        paths.append(str(tmp_path / f"{name}.parquet"))
    return paths


def test_files_dropped_rows_truncation_and_text(trainer: Trainer, files: list[str]) -> None:
    spec = trainer.spec(
        data__train_files=files,
        data__train_batch_size=4,
        data__sequence_length=15,
        data__truncation="left",
        data__shuffle=False,
    )
    attempt = trainer.prepare("seen", spec, planned_steps=6)
    second, first = steps(attempt, 2, 1, text=True).values()
    assert [row["row"] for row in first["rows"]] == [0, 2, 3, 4], "row 1 is dropped"
    assert [(Path(r["file"]).stem, r["row_in_file"]) for r in first["rows"]] == [
        ("a", 0),
        ("a", 2),
        ("b", 0),
        ("b", 1),
    ]
    assert first["samples_digest"] == samples_digest(np.array([0, 2, 3, 4]))
    assert [(row["row"], row["epoch"]) for row in second["rows"]] == [(5, 0), (6, 0), (0, 1), (2, 1)]
    assert [(row["length"], row["trained"]) for row in second["rows"][:2]] == [(15, 10), (3, 2)]
    # One character per token (see conftest): id 3 is `!`.
    text = "".join(chr(30 + i) for i in range(45, 60))
    assert second["rows"][0]["segments"] == [
        {"text": text[:5], "trained": False},
        {"text": text[5:], "trained": True},
    ]
    assert [len(s["text"]) for s in second["rows"][1]["segments"]] == [1, 2], "padding is no text"


def test_steps_of_a_row_and_those_of_a_fork(trainer: Trainer, files: list[str]) -> None:
    spec = trainer.spec(data__train_files=files, data__train_batch_size=4, data__shuffle=True)
    whole = trainer.prepare("seen", spec, planned_steps=9)
    # A fork at step 3 continues with smaller batches where its parent was.
    smaller = msgspec.structs.replace(spec, data=msgspec.structs.replace(spec.data, train_batch_size=2))
    fork = trainer.prepare("seen-fork", smaller, planned_steps=9, order_start=OrderStart(3, 12))
    rows = {n: [r["row"] for r in seen["rows"]] for n, seen in steps(whole, 1, 2, 3, 4).items()}
    after = {n: [r["row"] for r in seen["rows"]] for n, seen in steps(fork, 4, 5).items()}
    assert rows[4] == [*after[4], *after[5]]
    row = after[5][0]
    found = ask(whole, "--row", str(row), "--last-step", "4")["steps"]
    # A step that crosses the end of an epoch of six rows may see one twice.
    assert [s["step"] for s in found] == [n for n in rows for seen in rows[n] if seen == row]
    found = ask(fork, "--row", str(row), "--after-step", "3", "--last-step", "5")["steps"]
    assert [s["step"] for s in found] == [n for n in after for seen in after[n] if seen == row]
    assert ask(whole, "--row", "1", "--last-step", "9")["steps"] == [], "dropped"
    # A rollback to step 2 left four samples out.
    rolled = trainer.prepare("seen-rolled", spec, planned_steps=9, order_later=[OrderStart(2, 12)])
    assert [r["row"] for r in steps(rolled, 3)[3]["rows"]] == rows[4]
    with pytest.raises(ToolFailed, match="counted from 0") as failed:
        ask(whole, "--row", "7", "--last-step", "9")
    assert failed.value.exit_code == 2
