"""What events mean in MLflow's words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sftd.domain.log import events as e
from sftd.domain.run.goodput import ACCOUNTS, Ledger
from sftd.domain.run.state import Run, Status
from sftd.domain.spec.spec import Spec
from sftd.projections.mirrors.mlflow import mapping
from sftd.projections.mirrors.mlflow.app import is_open
from sftd.projections.mirrors.mlflow.server import ui_command


def submitted(**changes: Any) -> e.RunSubmitted:
    fields: dict[str, Any] = {
        "spec": msgspec.to_builtins(Spec()),
        "spec_digest": "d" * 64,
        "planned_steps": 10,
        "user": "ada",
        "data": {},
        "model": {},
        "sftd_version": "1.0",
    }
    return e.RunSubmitted(**fields | changes)


def recorded(event: e.Event, occurred_at: int = 1_700_000_000_123_456) -> e.Recorded:
    return e.Recorded(
        position=1,
        event_id="x",
        run_id="r",
        version=1,
        type=type(event).__name__,
        schema_version=1,
        occurred_at=occurred_at,
        recorded_at=occurred_at + 5_000_000,
        attempt=1,
        actor="test",
        causation_id=None,
        event=event,
    )


def step(number: int, **changes: Any) -> e.StepCompleted:
    fields: dict[str, Any] = {
        "epoch": 0,
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 1e-5,
        "tokens": 80,
        "tokens_real": 100,
        "tokens_padded": 128,
        "tokens_total": 80 * number,
        "samples": 4,
        "samples_digest": "s",
        "seconds": 0.5,
        "mfu": 0.5,
        "peak_memory_bytes": 3 * 2**29,
    }
    return e.StepCompleted(step=number, **fields | changes)


def test_figures_become_metrics_and_a_source_a_key_that_mlflow_takes() -> None:
    sources = {
        "docs/a b": e.SourceFigures(rows=3, tokens=60, loss=1.25),
        "..": e.SourceFigures(rows=1, tokens=20, loss=2.25),
        "x" * 300: e.SourceFigures(rows=1, tokens=20, loss=2.5),
    }
    figures: dict[str, Any] = {"token_accuracy": 0.5, "entropy": 1.25, "sources": sources}
    validation = e.ValidationCompleted(step=3, loss=800.0, tokens=9, rows=2, seconds=1.0, **figures)
    for event, prefix, perplexity in (
        (step(3, **figures), "", math.exp(1.5)),
        (validation, "val_", math.inf),
    ):
        points = mapping.points(recorded(event), {})
        assert len(points) == mapping.most_points(event)
        found = {p.key: p.value for p in points}
        expected = {
            "token_accuracy": 0.5,
            "entropy": 1.25,
            "perplexity": perplexity,
            "loss/docs_a b": 1.25,
            "loss/_": 2.25,
        }
        assert {f"{prefix}{key}": value for key, value in expected.items()}.items() <= found.items()
        assert found[f"{prefix}loss/{'x' * 300}"[:250]] == 2.5


def test_step_becomes_metrics_at_the_event_s_time() -> None:
    found = mapping.points(recorded(step(3)), {})
    assert len(found) == mapping.most_points(step(3))
    assert {p.key: p.value for p in found} == {
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 1e-5,
        "system/tokens_total": 240.0,
        "system/step_seconds": 0.5,
        "system/tokens_per_second": 200.0,
        "system/mfu": 0.5,
        "system/peak_memory_gib": 1.5,
    }
    assert {(p.timestamp, p.step) for p in found} == {(1_700_000_000_123, 3)}


def test_step_of_an_unknown_device_or_an_older_sftd_has_no_mfu() -> None:
    found = mapping.points(recorded(step(1, mfu=None, peak_memory_bytes=None)), {})
    assert not {"system/mfu", "system/peak_memory_gib"} & {p.key for p in found}


def test_step_without_duration_has_no_speed() -> None:
    assert "system/tokens_per_second" not in {
        p.key for p in mapping.points(recorded(step(1, seconds=0.0)), {})
    }


def test_redone_step_gives_nothing_and_validations_count_apart() -> None:
    highest: dict[str, int] = {}
    assert mapping.points(
        recorded(e.ValidationCompleted(step=0, loss=2, tokens=1, rows=1, seconds=1)), highest
    )
    assert mapping.points(recorded(step(4)), highest)
    assert not mapping.points(recorded(step(4, loss=9.0)), highest)
    assert not mapping.points(recorded(step(2)), highest)
    [point] = mapping.points(
        recorded(e.ValidationCompleted(step=3, loss=2, tokens=1, rows=1, seconds=1)), highest
    )
    assert point == mapping.MetricPoint("val_loss", 2, 1_700_000_000_123, 3)
    assert highest == {"StepCompleted": 4, "ValidationCompleted": 3}


def test_routers_have_metrics_where_there_are_any() -> None:
    seen = e.ValidationCompleted(step=3, loss=2, tokens=1, rows=1, seconds=1, expert_load={1: 0.25, 3: 0.5})
    found = {point.key: point.value for point in mapping.points(recorded(seen), {})}
    assert found == {"val_loss": 2, "expert_load/layer_1": 0.25, "expert_load/layer_3": 0.5}
    assert len(found) == mapping.most_points(seen)
    assert "fullest expert 50.0% (layer 3)" in seen.details()
    trained = step(4, load_balancing_loss=1.5, z_loss=9.0)
    values = {point.key: point.value for point in mapping.points(recorded(trained), {})}
    assert (values["load_balancing_loss"], values["z_loss"]) == (1.5, 9.0)
    assert "balance 1.500  z 9" in trained.details()


def test_a_look_at_the_host_has_the_names_of_mlflow_s_own_and_counts_looks() -> None:
    gpu = e.GpuSample(
        index=3,
        utilization_percent=97.0,
        memory_used_bytes=20_000_000_000,
        memory_total_bytes=80_000_000_000,
        power_watts=612.5,
    )
    sampled = e.SystemSampled(
        host="h",
        cpu_percent=41.5,
        memory_used_bytes=1_000_000_000,
        memory_total_bytes=4_000_000_000,
        gpus=[gpu],
    )
    highest: dict[str, int] = {}
    found = mapping.points(recorded(sampled), highest)
    assert len(found) == mapping.most_points(sampled)
    assert {p.key: p.value for p in found} == {
        "system/cpu_utilization_percentage": 41.5,
        "system/system_memory_usage_megabytes": 1000.0,
        "system/system_memory_usage_percentage": 25.0,
        "system/gpu_3_utilization_percentage": 97.0,
        "system/gpu_3_memory_usage_megabytes": 20_000.0,
        "system/gpu_3_memory_usage_percentage": 25.0,
        "system/gpu_3_power_usage_watts": 612.5,
    }
    assert {(p.timestamp, p.step) for p in found} == {(1_700_000_000_123, 0)}
    silent = e.GpuSample(
        index=0, utilization_percent=None, memory_used_bytes=None, memory_total_bytes=None, power_watts=None
    )
    again = mapping.points(recorded(msgspec.structs.replace(sampled, gpus=[silent])), highest)
    assert [(p.key.partition("/")[2][:6], p.step) for p in again] == [
        ("cpu_ut", 1),
        ("system", 1),
        ("system", 1),
    ]


def test_the_table_of_samples_has_an_answer_that_was_given_again_once() -> None:
    def answer(step: int, prompt: str, text: str) -> e.SampleGenerated:
        return e.SampleGenerated(step=step, prompt=prompt, text=text, tokens=2, stopped=True)

    given = [answer(5, "b?", "1"), answer(5, "a?", "2"), answer(9, "b?", "3"), answer(5, "b?", "again")]
    table = mapping.samples_table(given)
    assert table["columns"] == ["step", "prompt", "answer", "tokens", "stopped"]
    assert [row[:3] for row in table["data"]] == [[5, "b?", "1"], [5, "a?", "2"], [9, "b?", "3"]]


def test_the_end_of_a_run_says_where_its_time_went() -> None:
    micros = dict.fromkeys(ACCOUNTS, 0) | {"queued": 1_000_000, "productive": 3_000_000, "other": 1_000_000}
    assert mapping.time_tags(Ledger(5_000_000, 10_000_000, micros)) == {
        "sftd.goodput": "75.0%",
        "sftd.time": "queued 1.0 s, productive 3.0 s, other 1.0 s",
    }
    never_claimed = Ledger(0, 5, dict.fromkeys(ACCOUNTS, 0) | {"queued": 5_000_000})
    assert mapping.time_tags(never_claimed) == {"sftd.time": "queued 5.0 s"}


def test_status() -> None:
    expected: dict[Status, tuple[str, int | None]] = {
        "queued": ("SCHEDULED", None),
        "held": ("SCHEDULED", None),
        "paused": ("SCHEDULED", None),
        "retrying": ("RUNNING", None),
        "starting": ("RUNNING", None),
        "running": ("RUNNING", None),
        "stopping": ("RUNNING", None),
        "succeeded": ("FINISHED", 7),
        "failed": ("FAILED", 7),
        "cancelled": ("KILLED", 7),
    }
    for name, result in expected.items():
        assert mapping.status(Run("r", status=name, ended_at=7_999)) == result


def test_params_are_the_whole_spec_with_dotted_keys() -> None:
    found = mapping.params(msgspec.to_builtins(Spec()))
    assert found["optimizer.lr"] == "1e-05"
    assert found["model.megatron.tensor_model_parallel_size"] == "1"
    assert found["data.shuffle"] == "true"
    assert found["trainer.max_steps"] == "null"
    assert found["trainer.project_name"] == "default"
    assert found["data.train_files"] == "[]"
    assert found["model.override_config"] == "{}"
    assert not [key for key in found if key.startswith("launch.slurm")]
    on_slurm = mapping.params({"launch": {"launcher": "slurm", "slurm": {"time": ""}}})
    assert on_slurm == {"launch.launcher": "slurm", "launch.slurm.time": ""}
    assert mapping.params({}) == {}


def test_long_values_are_cut_and_stay_different() -> None:
    one, other = (
        mapping.params({"data": {"train_files": ["x" * 7000 + end]}})["data.train_files"] for end in "ab"
    )
    assert len(one) == len(other) == 6000
    assert one != other
    assert "7005 characters" in one
    assert mapping.fit("x" * 6000, 6000) == "x" * 6000


def test_keys_that_mlflow_refuses_are_fixed() -> None:
    assert mapping.params({"model": {"override_config": {"a//b@c:d": 1}}}) == {
        "model.override_config.a__b_c_d": "1"
    }
    [key] = mapping.params({"k" * 300: "v"})
    assert len(key) == 250


def test_datasets_fit_into_mlflow() -> None:
    files = [f"/data/{'long' * 20}/{i:06}.parquet" for i in range(2000)]
    event = submitted(
        data={
            "train": {"files": files, "digest": "a" * 64, "rows": 12, "tokens": 345, "longest": 9},
            "val": {"files": ["/data/val.parquet"], "digest": "b" * 64, "rows": 3},
        }
    )
    train, val = mapping.datasets(event)
    assert (train.context, train.name, train.digest) == ("train", "000000.parquet and 1999 more", "a" * 36)
    assert len(train.source) <= 65_535
    assert json.loads(train.source)["count"] == 2000
    assert json.loads(train.profile) == {"rows": 12, "tokens": 345}
    assert json.loads(val.source) == {"files": ["/data/val.parquet"], "count": 1}


def test_missing_facts_are_tolerated() -> None:
    assert mapping.datasets(submitted(data={"train": None, "val": {"rows": 3}})) == []
    bare = submitted(spec={})
    assert mapping.experiment_names(bare) == ("default", "sftd")
    assert mapping.run_name("run-1", bare) == "run-1"


def test_names_come_from_the_spec() -> None:
    event = submitted(spec={"trainer": {"project_name": "chat", "experiment_name": "first"}})
    assert mapping.experiment_names(event, "again/") == ("again/chat",)
    assert mapping.run_name("run-1", event) == "first run-1"


def test_tags_say_what_happened() -> None:
    failed = Run("r", status="failed", attempt=2, cause="oom", message="m" * 9000)
    tags = mapping.tags(failed, failed.spec)
    assert tags["sftd.status"] == "failed"
    assert tags["sftd.attempts"] == "2"
    assert tags["sftd.cause"] == "oom"
    assert len(tags["sftd.message"]) == 5000
    assert mapping.tags(Run("r", sweep="sweep-1"), Spec())["sftd.sweep"] == "sweep-1"
    assert mapping.tags(Run("r"), Spec()) == {"sftd.status": "queued", "sftd.attempts": "0"}, "none is empty"
    first = mapping.first_tags("run-1", submitted(warnings=["odd"]))
    assert first["sftd.run"] == "run-1"
    assert first["sftd.version"] == "1.0"
    assert "odd" in first["mlflow.note.content"]


def test_what_a_resume_changed_is_a_tag_until_it_is_changed_back() -> None:
    was = Spec()
    now = msgspec.structs.replace(was, trainer=msgspec.structs.replace(was.trainer, max_steps=500))
    tags = mapping.tags(Run("r", spec=now, spec_digest="new"), was)
    assert (tags["sftd.changed.trainer.max_steps"], tags["sftd.spec_digest"]) == ("500", "new")
    assert mapping.is_taken_back("sftd.changed.trainer.max_steps")
    assert not [key for key in mapping.tags(Run("r", spec=was), was) if "changed" in key]
    assert not mapping.is_taken_back("sftd.exported")


def test_a_cursor_says_in_which_form() -> None:
    assert mapping.parse_cursor(mapping.cursor_tag(7)) == (7, 7)
    assert mapping.parse_cursor("7") == (0, 7), "of an older sftd"
    assert mapping.parse_cursor("seven") == mapping.parse_cursor("") == (0, 0)


def test_ui_command() -> None:
    assert ui_command("http://mlflow.example", None, 5000) is None
    assert ui_command("https://mlflow.example", None, 5000) is None
    command = ui_command("postgresql://u:secret@h/mlflow", Path("/home/x/mlartifacts"), 5001)
    assert command is not None
    argv, environment = command
    assert not [a for a in argv if "secret" in a]
    assert "5001" in argv
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://u:secret@h/mlflow"
    assert environment["MLFLOW_SERVER_ALLOWED_HOSTS"] == "127.0.0.1:5001,localhost:5001"


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/", True),
        ("GET", "/static-files/static/js/main.js", True),
        ("POST", "/graphql", True),
        ("POST", "/ajax-api/2.0/mlflow/runs/search", True),
        ("POST", "/ajax-api/2.0/mlflow/runs/set-tag", True),
        ("GET", "/get-artifact", True),
        ("GET", "/ajax-api/2.0/mlflow-artifacts/artifacts/1/a", True),
        # It runs commands, sends requests, or writes and reads files that somebody else names.
        ("PUT", "/ajax-api/3.0/mlflow/assistant/config", False),
        ("POST", "/ajax-api/3.0/mlflow/gateway/endpoints/create", False),
        ("GET", "/ajax-api/2.0/mlflow/gateway-proxy", False),
        ("POST", "/gateway/mlflow/v1/chat/completions", False),
        ("POST", "/api/2.0/mlflow/webhooks", False),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/x", False),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact", False),
        ("POST", "/api/2.0/mlflow/experiments/create", False),
        ("POST", "/api/2.0/mlflow/model-versions/create", False),
        ("POST", "/ajax-api/2.0/mlflow/runs/create-promptlab-run", False),
        ("POST", "/ajax-api/3.0/mlflow/genai/evaluate/invoke", False),
    ],
)
def test_only_what_pages_of_runs_need_is_served(method: str, path: str, expected: bool) -> None:
    assert is_open(method, path) is expected


def test_importing_the_mirror_does_not_import_mlflow() -> None:
    code = "import sys, sftd.projections.mirrors.mlflow.mirror; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
