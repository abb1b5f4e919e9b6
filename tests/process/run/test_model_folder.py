"""Under a real daemon: a model folder that changes, or is gone, while a run lives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.builders import json_fields
from tests.builders.process.homes import Home
from tests.builders.process.tiny_llama import write_tiny_model


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_byte(path: Path, tensor: str, offset: int) -> None:
    """Change one byte of a tensor."""
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + header])[tensor]["data_offsets"]
    data[8 + header + begin + offset] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> tuple[Home, str, Path]:
    """A run of six steps with checkpoints of 3 and 6, and its model folder, of which there is a `backup`."""
    path = tmp_path_factory.mktemp("model-folder")
    model = write_tiny_model(path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    home = Home(path, model, warm_python)
    shutil.copytree(model, path / "backup")
    run_id = home.submit("trainer.max_steps=6", "trainer.save_interval=3", "checkpoint.keep_last=9")
    home.drain()
    assert home.show(run_id)["status"] == "succeeded"
    return home, run_id, model


@pytest.fixture
def trained(story: tuple[Home, str, Path]) -> tuple[Home, str, Path]:
    """`story` with the model folder as it was."""
    _, _, model = story
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(model.parent / "backup", model)
    return story


def test_weights_that_are_replaced_before_the_start_are_refused(trained: tuple[Home, str, Path]) -> None:
    home, _, model = trained
    run_id = home.submit("trainer.max_steps=2")
    # Another training of the same model: the same size and the same header.
    flip_byte(model / "model.safetensors", "model.norm.weight", 3)
    home.drain()
    shown = home.show(run_id)
    assert (shown["status"], shown["attempt"], shown["step"]) == ("failed", 1, 0)
    assert f"{model} changed since the run was submitted" in shown["message"]
    assert "model.safetensors: holds other weights" in shown["message"]
    failed = home.events(run_id, "AttemptFailed")[0]["payload"]
    assert failed["cause"] == "user error"
    assert f"sftd fork {run_id} --from-step 0 --changed-model" in failed["message"]


def test_the_log_knows_all_of_the_weights_before_the_first_step(trained: tuple[Home, str, Path]) -> None:
    home, run_id, model = trained
    types = [event["type"] for event in home.events(run_id)]
    assert types.index("ModelLoaded") < types.index("WeightsDigested") < types.index("StepCompleted")
    digested = home.events(run_id, "WeightsDigested")[0]["payload"]
    assert digested["bytes"] == (model / "model.safetensors").stat().st_size
    submitted = home.events(run_id, "RunSubmitted")[0]["payload"]["model_files"]
    names = ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json"]
    assert list(submitted["files"]) == names
    assert submitted["contents"]["config.json"]["rope_theta"] == 10000.0


def test_a_changed_config_is_named_and_refused_and_the_export_has_what_was_trained(
    trained: tuple[Home, str, Path],
) -> None:
    home, run_id, model = trained
    edit_config(model, rope_theta=77777.0, rms_norm_eps=0.25)
    named = "rms_norm_eps is 0.25, was 0.00001; rope_theta is 77777.0, was 10000.0"
    for command in (
        ("resume", run_id, "--from-step", "3"),
        ("verify", run_id),
        ("fork", run_id, "trainer.max_steps=8"),
    ):
        refused = home.run(*command, check=2).stderr
        assert f"{model}/config.json changed since " in refused
        assert f" was submitted: {named}" in refused
        assert "fix: put the folder back as it was" in refused
        assert "--changed-model" in refused
    assert home.show(run_id)["status"] == "succeeded"
    home.run("export", run_id, "changed")
    exported = json.loads((home.path / "changed" / "config.json").read_text())
    assert (exported["rope_theta"], exported["rms_norm_eps"]) == (10000.0, 1e-5)
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (home.path / "changed" / name).read_text() == (model / name).read_text()

    asked = home.run("fork", run_id, "--from-step", "3", "--changed-model", "--json")
    fork = json.loads(asked.stdout)
    assert any(named in warning for warning in fork["warnings"])
    home.drain()
    assert home.show(fork["run_id"])["status"] == "succeeded"
    home.run("export", fork["run_id"], "forked")
    assert json.loads((home.path / "forked" / "config.json").read_text())["rope_theta"] == 77777.0


def test_an_export_is_proven(trained: tuple[Home, str, Path]) -> None:
    home, run_id, _ = trained
    asked = home.run("export", run_id, "proven", "--prove", "--json")
    exported = json.loads(asked.stdout)
    json_fields.check("export --prove", exported)
    assert "row 8 of 8" in asked.stderr
    [event] = home.events(run_id, "ExportProven", "ExportDiverged")
    assert (event["type"], event["payload"]) == ("ExportProven", exported["proof"])
    assert (event["payload"]["rows"], event["payload"]["tokens"]) == (8, 128)
    assert event["payload"]["digest"] == exported["digest"]
    refused = home.run("export", run_id, "merged", "--merge", check=2).stderr
    assert f"{run_id} has no adapters to merge" in refused


def test_an_adapter_is_exported_and_proven_with_the_weights_that_it_was_trained_beside(
    trained: tuple[Home, str, Path],
) -> None:
    home, _, model = trained
    run_id = home.submit("model.lora.rank=4", "optimizer.lr=0.01", "trainer.max_steps=2")
    home.drain()
    assert "peft" in home.run("export", run_id, "adapter", "--prove").stdout
    assert home.events(run_id, "ExportProven")
    assert not (home.path / "adapter" / "config.json").exists()
    assert json.loads((home.path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(model)
    home.run("export", run_id, "merged", "--merge")
    assert (home.path / "merged" / "model.safetensors").stat().st_size == (
        model / "model.safetensors"
    ).stat().st_size
    flip_byte(model / "model.safetensors", "model.norm.weight", 3)
    refused = home.run("export", run_id, "other", check=2).stderr
    assert "model.safetensors changed since the run was submitted: holds other weights" in refused


def test_a_change_that_happens_while_a_run_waits_ends_its_attempt(trained: tuple[Home, str, Path]) -> None:
    home, run_id, model = trained
    home.run("resume", run_id, "--from-step", "3")
    (model / "chat_template.jinja").unlink()
    home.drain()
    shown = home.show(run_id)
    assert shown["status"] == "failed"
    assert "chat_template.jinja: is gone" in shown["message"]
    (model / "chat_template.jinja").write_text("{{ messages }}")
    home.run("resume", run_id)
    home.drain()
    assert home.show(run_id)["status"] == "succeeded"


def test_a_byte_that_no_sample_sees_is_found_when_the_weights_are_loaded_again(
    trained: tuple[Home, str, Path],
) -> None:
    home, run_id, model = trained
    flip_byte(model / "model.safetensors", "model.embed_tokens.weight", 0)
    failed = home.run("verify", run_id, "--from-step", "0", check=1).stderr
    assert "changed since the run's first attempt" in failed
    assert "model.safetensors holds other weights" in failed


def test_a_folder_that_is_gone_is_needed_for_nothing_that_starts_from_a_checkpoint(
    trained: tuple[Home, str, Path],
) -> None:
    home, run_id, model = trained
    shutil.rmtree(model)
    home.run("export", run_id, "gone")
    assert json.loads((home.path / "gone" / "config.json").read_text())["rope_theta"] == 10000.0
    assert "verified" in home.run("verify", run_id, "--from-step", "3").stdout
    home.run("resume", run_id, "--from-step", "3")
    home.drain()
    shown = home.show(run_id)
    assert (shown["status"], shown["anomalies"]) == ("succeeded", 0)


def test_a_run_of_an_older_sftd_is_resumed_with_a_note(trained: tuple[Home, str, Path]) -> None:
    home, run_id, model = trained
    engine = sa.create_engine(f"sqlite:///{home.path}/home/sftd.db", poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE events SET schema_version = 1, payload = json_remove(payload, '$.model_files') "
                "WHERE type = 'RunSubmitted'"
            )
        )
    edit_config(model, max_position_embeddings=512)
    resumed = home.run("resume", run_id, "--from-step", "3")
    assert f"{run_id}: an older sftd submitted it without recording the model folder" in resumed.stderr
    home.drain()
    shown = home.show(run_id)
    assert (shown["status"], shown["anomalies"]) == ("succeeded", 0)
