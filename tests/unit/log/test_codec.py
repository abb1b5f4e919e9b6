"""Events to JSON and back: bit for bit, and for as long as a log lives."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftd.domain.errors import UnknownEvent
from sftd.domain.log import codec, events
from sftd.domain.log.events import EVENT_TYPES, Event, StepCompleted
from tests.builders import paths

GOLDEN: list[dict[str, Any]] = json.loads((paths.GOLDEN / "events.json").read_text())


def bits(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


def step(loss: float) -> StepCompleted:
    return StepCompleted(
        step=1,
        epoch=0,
        loss=loss,
        grad_norm=1.0,
        lr=1e-5,
        tokens=1,
        tokens_real=1,
        tokens_padded=1,
        tokens_total=1,
        samples=1,
        samples_digest="d",
        seconds=1.0,
    )


@pytest.mark.parametrize("line", GOLDEN, ids=lambda line: f"{line['type']}-v{line['v']}")
def test_a_published_shape_reads_as_it_always_did(line: dict[str, Any]) -> None:
    """golden/events.json holds each event as some sftd wrote it. When this fails, an event's shape was changed in place:
    give it a new schema version with an upcast, and add a line to the file instead of changing one."""
    event = codec.decode(line["type"], line["v"], json.dumps(line["p"]))
    name, version, payload = codec.encode(event)
    assert name == line["type"]
    if version == line["v"]:
        assert json.loads(payload) == line["p"]
        assert list(json.loads(payload)) == list(line["p"])


def test_every_event_says_in_a_line_what_matters_of_it() -> None:
    """golden/summaries.tsv: type, version and the line of `sftd events`. A new type without a summary fails here."""
    recorded = (paths.GOLDEN / "summaries.tsv").read_text().splitlines()
    decoded = [(line, codec.decode(line["type"], line["v"], json.dumps(line["p"]))) for line in GOLDEN]
    assert [f"{line['type']}\t{line['v']}\t{event.summary()}" for line, event in decoded] == recorded
    assert all({"summary", "details"} & vars(cls).keys() for cls in EVENT_TYPES.values())


def having(flag: str, value: object = True) -> set[str]:
    return {name for name, cls in EVENT_TYPES.items() if getattr(cls, flag) == value}


def test_what_each_type_of_event_is() -> None:
    assert having("severity", "problem") == {
        "AnomalyDetected", "AttemptFailed", "AttemptLost", "CheckpointRejected", "EvaluationFailed", "ExportDiverged",
        "ReplayDiverged", "RunFailed",
    }  # fmt: skip
    assert having("severity", "detail") == {
        "CheckpointDeleted", "CheckpointPinned", "CheckpointReduced", "CheckpointStarted", "CheckpointUnpinned", "DataBound",
        "EvaluationInterrupted", "EvaluationRequested", "EvaluationStarted", "SampleGenerated", "TrainingResumed", "WeightsDigested",
    }  # fmt: skip
    assert EVENT_TYPES.keys() == having("severity", "news") | having("severity", "problem") | having(
        "severity", "detail"
    )
    ends = {
        "AttemptFailed",
        "AttemptLost",
        "AttemptPaused",
        "AttemptPreempted",
        "RunCancelled",
        "RunFailed",
        "RunSucceeded",
    }
    assert (having("ends_attempt"), having("ends_attempt", False)) == (ends, EVENT_TYPES.keys() - ends)
    lifecycle = ends | {
        "AttemptClaimed", "CheckpointDeleted", "CheckpointPublished", "CheckpointReduced", "CheckpointRejected",
        "ModelExported", "ModelRegistered", "ResumeRequested", "RunForked", "RunHeld", "RunReleased", "RunSubmitted",
        "StopRequested", "StoppedEarly", "SweepJoined", "TrainingResumed",
    }  # fmt: skip
    assert (having("is_lifecycle"), having("is_lifecycle", False)) == (
        lifecycle,
        EVENT_TYPES.keys() - lifecycle,
    )


def test_every_event_type_of_every_version_is_in_the_golden_file() -> None:
    have = {(line["type"], line["v"]) for line in GOLDEN}
    assert have == {(name, v) for name, cls in EVENT_TYPES.items() for v in range(1, cls.schema_version + 1)}


NO_FIGURES = {"token_accuracy": None, "entropy": None, "sources": None}
# What each old version did not say, as it must be read today.
UPCAST: dict[tuple[str, int], dict[str, Any]] = {
    ("RunSubmitted", 1): {"model_files": None},
    ("StepCompleted", 1): {
        "mfu": None,
        "peak_memory_bytes": None,
        "load_balancing_loss": None,
        "z_loss": None,
        **NO_FIGURES,
    },
    ("StepCompleted", 2): {"load_balancing_loss": None, "z_loss": None, **NO_FIGURES},
    ("StepCompleted", 3): NO_FIGURES,
    ("ValidationCompleted", 1): {"expert_load": None, **NO_FIGURES},
    ("ValidationCompleted", 2): NO_FIGURES,
    ("StopRequested", 1): {"then": "cancelled", "now": False, "preempted_by": None},
    ("ResumeRequested", 1): {"changes": {}, "spec": None, "spec_digest": None, "planned_steps": None},
    ("RunForked", 1): {"mixture": None},
    ("AttemptPreempted", 1): {"reason": ""},
    ("RunSucceeded", 1): {"reason": ""},
    ("ModelLoaded", 1): {"trained_parameters": None},
}


def test_every_old_version_reads_as_what_it_said_and_nothing_more() -> None:
    old = [line for line in GOLDEN if line["v"] < EVENT_TYPES[line["type"]].schema_version]
    assert {(line["type"], line["v"]) for line in old} == UPCAST.keys()
    for line in old:
        name, version, payload = codec.encode(codec.decode(line["type"], line["v"], json.dumps(line["p"])))
        assert version == EVENT_TYPES[name].schema_version
        assert json.loads(payload) == line["p"] | UPCAST[line["type"], line["v"]]


def test_every_upcast_that_is_needed_is_there() -> None:
    needed = {(name, v) for name, cls in EVENT_TYPES.items() for v in range(1, cls.schema_version)}
    assert set(codec.UPCASTS) == needed


@given(st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True))
def test_floats_read_back_bit_for_bit(value: float) -> None:
    name, version, payload = codec.encode(step(value))
    back = codec.decode(name, version, payload)
    assert isinstance(back, StepCompleted)
    assert bits(back.loss) == bits(value)


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 5e-324, -2.2250738585072014e-308, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
)
def test_the_odd_floats_read_back_bit_for_bit(value: float) -> None:
    back = codec.decode(*codec.encode(step(value)))
    assert isinstance(back, StepCompleted)
    assert bits(back.loss) == bits(value)


def test_the_payload_is_json_that_every_reader_takes() -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    payload = json.loads(codec.encode(step(math.nan))[2], parse_constant=no_constant)
    assert payload["loss"] == "NaN"
    anomaly = events.AnomalyDetected(
        step=1, what="x", detail={"a": [math.inf, {"b": -math.inf}], "c": (math.nan,)}
    )
    detail = json.loads(codec.encode(anomaly)[2], parse_constant=no_constant)["detail"]
    assert detail == {"a": ["Infinity", {"b": "-Infinity"}], "c": ["NaN"]}


def test_a_type_or_version_of_a_newer_sftd_is_named() -> None:
    for name, version in (("RunTeleported", 1), ("RunSubmitted", 99)):
        with pytest.raises(UnknownEvent, match=f"{name} v{version}.*newer"):
            codec.decode(name, version, "{}")


def test_a_payload_of_a_wrong_shape_is_not_an_event() -> None:
    for payload in ('{"step": "one"}', "{}", "[]", "{", '{"step": 1.5}'):
        with pytest.raises(msgspec.MsgspecError):
            codec.decode("CheckpointStarted", 1, payload)


def test_upcasts_are_chained_from_the_version_that_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weighed(Event, frozen=True):
        """A test's event in its third shape."""

        schema_version: ClassVar[int] = 3
        grams: float
        by: str

    monkeypatch.setitem(EVENT_TYPES, "Weighed", Weighed)
    monkeypatch.setitem(codec.UPCASTS, ("Weighed", 1), lambda p: {"kilos": p["weight"], "by": "?"})
    monkeypatch.setitem(codec.UPCASTS, ("Weighed", 2), lambda p: {"grams": p["kilos"] * 1000, "by": p["by"]})
    assert codec.decode("Weighed", 1, '{"weight": 2}') == Weighed(grams=2000.0, by="?")
    assert codec.decode("Weighed", 2, '{"kilos": 2, "by": "ada"}') == Weighed(grams=2000.0, by="ada")
    assert codec.decode("Weighed", 3, '{"grams": "Infinity", "by": "ada"}') == Weighed(
        grams=math.inf, by="ada"
    )
    assert codec.encode(Weighed(grams=1.0, by="x"))[:2] == ("Weighed", 3)
