"""What `sftd export --prove` makes of what its two processes report."""

from __future__ import annotations

import msgspec
import pytest

from sftd.cli import proof
from sftd.domain.errors import Refused, SftdError
from sftd.domain.log.events import ExportDiverged, ExportProven, ModelExported
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.spec import Spec

DONE = {
    "rows": 8,
    "positions": 95,
    "largest_difference": "2e-06",
    "tolerance": "1e-05",
    "rounding": "float32",
    "tokens": 128,
    "other_token": "",
    "versions": {"torch": "2", "transformers": "5", "peft": "0.21"},
}
EXPORTED = ModelExported(step=6, path="/m", bytes=1, digest="d", dtype="bfloat16")
CHECKPOINT = CheckpointInfo(
    step=6, path="/c", bytes=1, manifest_digest="m", tokens_total=9, version=1, published_at=0
)


def found(monkeypatch: pytest.MonkeyPatch, **changes: str) -> ExportProven | ExportDiverged:
    answers = {"export.reference": {"train_digest": "t"}, "export.prove": DONE | changes}
    monkeypatch.setattr(proof, "run_with_stages", lambda _title, tool, _arguments: answers[tool])
    run = Run(run_id="run-1", spec=Spec(), train_digest="t")
    return proof.Proof(run, CHECKPOINT, "order.json", "/tmp", merge=False).of(EXPORTED)


def test_an_equal_export_is_proven(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    event = found(monkeypatch)
    assert isinstance(event, ExportProven)
    assert msgspec.to_builtins(event) == {
        **{name: value for name, value in DONE.items() if name != "other_token"},
        "step": 6,
        "path": "/m",
        "digest": "d",
        "largest_difference": 2e-6,
        "tolerance": 1e-5,
    }
    proof.show(event)
    assert capsys.readouterr().out == (
        "proven with transformers 5 and peft 0.21 on 8 recorded rows, 95 positions:\n"
        "  largest difference of a logit 2.0e-06 (tolerance 1.0e-05, the rounding of float32)\n"
        "  128 tokens of answers compared, all equal\n"
    )
    proof.show(event, quiet=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"largest_difference": "1.1e-05"},
        {"largest_difference": "nan"},
        {"tolerance": "nan"},
        {"other_token": "row 1: x"},
    ],
    ids=str,
)
def test_any_difference_is_an_error(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]) -> None:
    event = found(monkeypatch, **changes)
    assert isinstance(event, ExportDiverged)
    assert event.other_token == changes.get("other_token", "")
    with pytest.raises(SftdError, match="/m is not what was trained: loaded with transformers 5") as raised:
        proof.show(event, quiet=True)
    assert raised.value.exit_code == 1
    assert "fix: " in str(raised.value)


def test_rows_of_other_files_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "run_with_stages", lambda *_: {"train_digest": "other"})
    run = Run(run_id="run-1", spec=Spec(), train_digest="t")
    with pytest.raises(Refused, match="the files changed since the submit"):
        proof.Proof(run, CHECKPOINT, "order.json", "/tmp", merge=False)
