"""A model folder is recorded at submit; what changed in it is named, and an export's files outlive it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sftd.domain.errors import Refused
from sftd.domain.log.model_record import ModelRecord
from sftd.domain.model.files import ModelFile, ModelFiles, differences
from sftd.domain.spec.model_section import Lora, Model
from sftd.domain.spec.spec import Spec
from sftd.operations.queries import model_files
from sftd.trainer.errors import UserError
from sftd.trainer.model.files_check import checked_spec
from sftd.wire.attempt.directory import Order, model_copy
from sftd.wire.model import digest as model_digest

CONFIG = {"rms_norm_eps": 1e-05, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def save_weights(path: Path, *, add: float = 0.0, to: str = "") -> None:
    """Tensors of one shape and name each time, so that only their values differ."""
    tensors = {f"model.{n}.weight": np.full((64, 64), n, dtype=np.float32) for n in range(4)}
    if to:
        tensors[to] += np.float32(add)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "additional_chat_templates").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (path / "modeling_own.py").write_text("pass")
    (path / "LICENSE.txt").write_text("all rights")
    (path / "README.md").write_text("not read")
    save_weights(path / "model.safetensors")
    return path


def spec_of(folder: Path, **changes: Any) -> Spec:
    return Spec(model=Model(partial_pretrain=str(folder), **changes))


def changed(
    folder: Path, change: Callable[[], object], *, weights: bool = True, code: bool = False
) -> dict[str, str]:
    """What a change of the folder is reported as."""
    was = model_digest.describe(str(folder))
    change()
    return differences(was, model_digest.describe(str(folder)), weights=weights, code=code)


def test_everything_that_a_run_reads_is_recorded(folder: Path) -> None:
    found = model_digest.describe(str(folder))
    assert sorted(found.files) == [
        "LICENSE.txt",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "modeling_own.py",
        "tokenizer.json",
    ]
    assert list(found.weights) == ["model.safetensors"]
    assert found.contents == {"config.json": CONFIG, "generation_config.json": {"eos_token_id": 2}}
    assert found == model_digest.describe(str(folder))


def test_a_changed_config_is_named_key_by_key_with_both_values(folder: Path) -> None:
    rope = CONFIG["rope_parameters"] | {"rope_theta": 500000.0}  # type: ignore[operator]
    new = {"rope_parameters": rope, "head_dim": 32}
    assert changed(folder, lambda: (folder / "config.json").write_text(json.dumps(new))) == {
        "config.json": "head_dim is 32, was not set; rms_norm_eps is gone, was 0.00001; "
        "rope_parameters.rope_theta is 500000.0, was 10000.0"
    }


def test_many_changed_keys_and_long_values_are_cut(folder: Path) -> None:
    new = CONFIG | {f"key{n}": "x" * 99 for n in range(9)}
    detail = changed(folder, lambda: (folder / "config.json").write_text(json.dumps(new)))["config.json"]
    assert detail.endswith("; 3 more keys")
    assert "x" * 58 + "…" in detail
    assert "x" * 60 not in detail


def test_the_same_config_written_in_another_way_is_no_change(folder: Path) -> None:
    rewritten = json.dumps(dict(reversed(CONFIG.items())), indent=4)
    assert changed(folder, lambda: (folder / "config.json").write_text(rewritten)) == {}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
)
def test_a_changed_tokenizer_or_template_is_named(folder: Path, name: str) -> None:
    [(found, detail)] = changed(folder, lambda: (folder / name).write_text("other")).items()
    assert found == name
    assert detail.startswith("sha256 is ")
    assert changed(folder, (folder / name).unlink) == {name: "is gone"}
    assert changed(folder, lambda: (folder / name).write_text("new")) == {name: "was not there"}


def test_code_counts_where_it_is_executed_and_licences_never(folder: Path) -> None:
    def change() -> None:
        (folder / "modeling_own.py").write_text(f"x = {os.urandom(4)!r}")
        (folder / "LICENSE.txt").write_text("some rights")

    assert changed(folder, change) == {}
    assert list(changed(folder, change, code=True)) == ["modeling_own.py"]


def test_weights_with_other_values_under_the_same_header_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    for name in ("model.0.weight", "model.3.weight"):
        found = changed(folder, lambda name=name: save_weights(path, add=1e-3, to=name))
        assert found == {"model.safetensors": "holds other weights"}
        assert path.stat().st_size == size
    assert changed(folder, lambda: save_weights(path), weights=False) == {}


def test_weights_that_are_cut_missing_or_new_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    assert changed(folder, lambda: os.truncate(path, size - 4)) == {
        "model.safetensors": f"has {size - 4:,} bytes, had {size:,}"
    }
    assert changed(folder, path.unlink) == {"model.safetensors": "is gone"}
    assert changed(folder, lambda: save_weights(path)) == {"model.safetensors": "was not there"}
    path.write_bytes(b"\xff" * 64)
    assert model_digest.describe(str(folder)).weights["model.safetensors"].bytes == 64


def test_only_the_weights_in_the_index_count(folder: Path) -> None:
    index = {"weight_map": {"model.0.weight": "model.safetensors", "model.1.weight": "missing.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_weights(folder / "consolidated.safetensors")
    found = model_digest.describe(str(folder))
    assert list(found.weights) == ["model.safetensors"]
    assert "model.safetensors.index.json" in found.files
    index["weight_map"]["model.1.weight"] = "model.safetensors"
    rewrite = lambda: (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # noqa: E731
    assert changed(folder, rewrite, weights=False) == {}


def test_a_folder_of_links_is_as_the_files_behind_them(folder: Path, tmp_path: Path) -> None:
    """As the cache of huggingface_hub has its snapshots."""
    linked = tmp_path / "snapshot"
    for path in (p for p in folder.rglob("*") if p.is_file()):
        link = linked / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert model_digest.describe(str(linked)) == model_digest.describe(str(folder))


@pytest.mark.parametrize(
    "text",
    ['{"a": 1e999}', '{"a": NaN}', '{"a": "\\u0000"}', "[]", '{"a": "\\ud800"}', '{"a": ' + "[" * 60_000],
)
def test_a_config_that_the_log_cannot_hold_is_compared_by_its_digest(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    found = model_digest.describe(str(folder))
    assert "config.json" not in found.contents
    assert found.files["config.json"].bytes == len(text)


def test_a_weight_file_with_a_broken_length_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 28).to_bytes(8, "little"))
    os.truncate(path, 1 << 29)
    tracemalloc.start()
    try:
        model_digest.sampled_digest(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header", [b'{"a": {"data_offsets": [%d, %d]}}' % (10**30, 10**31), b'{"a": ' + b"[" * 60_000]
)
def test_a_hostile_header_of_weights_is_no_crash(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with contextlib.suppress(Refused):
        model_digest.describe(str(folder))


def test_every_file_that_a_tokenizer_is_read_from_is_recorded(folder: Path) -> None:
    for name in ("qwen.tiktoken", "tekken.json"):
        (folder / name).write_text("x")
        assert name in model_digest.describe(str(folder)).files


def test_a_change_is_refused_with_a_fix_and_a_run_without_a_record_is_not(folder: Path) -> None:
    record, spec = ModelRecord(model_digest.describe(str(folder))), spec_of(folder)
    model_digest.refuse_changes(record, spec, weights=True, fix="f")
    (folder / "tokenizer.json").write_text("[]")
    save_weights(folder / "model.safetensors", add=1.0, to="model.0.weight")
    with pytest.raises(Refused) as refused:
        model_digest.refuse_changes(record, spec, weights=True, fix="f")
    assert [(p.where, p.fix) for p in refused.value.problems] == [
        ("model.partial_pretrain", ""),
        ("model.partial_pretrain", "f"),
    ]
    assert refused.value.problems[1].what == (
        f"{folder}/model.safetensors changed since the run was submitted: holds other weights"
    )
    model_digest.refuse_changes(ModelRecord(), spec, weights=True, fix="f")
    shutil.rmtree(folder)
    with pytest.raises(Refused, match="no such folder"):
        model_digest.refuse_changes(record, spec, weights=False, fix="f")


def test_a_copy_holds_all_but_the_weights_and_outlives_the_folder(folder: Path, tmp_path: Path) -> None:
    record, spec = ModelRecord(model_digest.describe(str(folder))), spec_of(folder)
    assert record.files is not None
    copy = model_copy(tmp_path / "home", record.files)
    assert model_digest.source(record, spec, [copy]) == str(folder)
    model_digest.keep(record.files, str(folder), copy)
    model_digest.keep(record.files, str(folder), copy)
    kept = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()}
    assert kept == set(record.files.files)
    assert list(copy.parent.iterdir()) == [copy]
    (folder / "config.json").write_text("{}")
    assert model_digest.source(record, spec, [copy]) == str(copy)
    shutil.rmtree(folder)
    assert model_digest.source(record, spec, [tmp_path / "elsewhere", copy]) == str(copy)
    # A damaged copy is not used.
    (copy / "tokenizer.json").write_text("damaged")
    with pytest.raises(Refused, match="no such folder"):
        model_digest.source(record, spec, [copy])


@pytest.mark.parametrize("trained", [{"lora": Lora(rank=8)}, {"freeze": ["0"]}])
def test_a_run_with_frozen_weights_needs_its_folder_at_each_attempt(
    folder: Path, tmp_path: Path, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints hold what is trained. One of the whole model needs no weights."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    record = ModelRecord(model_digest.describe(str(folder)))
    assert record.files is not None
    copy = model_copy(tmp_path / "home", record.files)
    model_digest.keep(record.files, str(folder), copy)

    def attempt(**fields: Any) -> Spec:
        order = {"run_id": "r", "attempt": 2, "token": "", "planned_steps": 9, "checkpoint_dir": "/c"}
        order |= {"checkpoint": "/c/step-00000003", "model_files": record.files}
        root = str(tmp_path / "home")
        return checked_spec(Order(**order, spec=spec_of(folder, **fields), model_root=root))

    assert model_digest.source(record, spec_of(folder), [copy], weights=True) == str(folder)
    save_weights(folder / "model.safetensors", add=1.0, to="model.0.weight")
    assert model_files.check_unchanged(record, "r", spec_of(folder), pretrained=False)
    assert attempt().model.partial_pretrain == str(folder)
    with pytest.raises(Refused, match="--from-step 0 --changed-model"):
        model_files.check_unchanged(record, "r", spec_of(folder, **trained), pretrained=False)
    with pytest.raises(UserError, match=r"--from-step 0 --changed-model.*holds other weights"):
        attempt(**trained)
    with pytest.raises(Refused, match="holds other weights"):
        model_digest.source(record, spec_of(folder), [copy], weights=True)
    shutil.rmtree(folder)
    assert attempt().model.partial_pretrain == str(copy)
    with pytest.raises(UserError, match="no such folder"):
        attempt(**trained)


def test_a_damaged_copy_is_replaced_and_a_changed_folder_is_not_copied(folder: Path, tmp_path: Path) -> None:
    files = model_digest.describe(str(folder))
    copy = model_copy(tmp_path, files)
    model_digest.keep(files, str(folder), copy)
    (copy / "tokenizer.json").unlink()
    model_digest.keep(files, str(folder), copy)
    assert model_digest.is_copy(files, copy)
    shutil.rmtree(copy)
    (folder / "LICENSE.txt").write_text("another")
    model_digest.keep(files, str(folder), copy)
    assert list(copy.parent.iterdir()) == []


def test_a_run_without_a_record_is_exported_from_its_folder(folder: Path, tmp_path: Path) -> None:
    assert model_digest.source(ModelRecord(), spec_of(folder), [tmp_path]) == str(folder)


def test_a_config_with_many_changes_lists_six_of_them() -> None:
    def files(value: int, keys: int, *, known: bool = True) -> ModelFiles:
        content = {f"key{n}": value for n in range(keys)}
        return ModelFiles(
            {"config.json": ModelFile(1, f"{value}" * 64)}, {}, {"config.json": content} if known else {}
        )

    def said(keys: int) -> str:
        return differences(files(1, keys), files(2, keys), weights=True, code=True)["config.json"]

    assert said(6).count("is 2, was 1") == 6
    assert "more" not in said(6)
    assert said(7).endswith("; 1 more keys")
    # Where one of the two was too large for the log.
    for was, now in ((files(1, 2, known=False), files(2, 2)), (files(1, 2), files(2, 2, known=False))):
        found = differences(was, now, weights=True, code=True)["config.json"]
        assert found == "sha256 is 222222222222…, was 111111111111…"


def test_a_changed_folder_is_used_in_a_fork() -> None:
    plain, again = (model_digest.fork_fix("r", weights=weights) for weights in (False, True))
    assert "sftd fork r --changed-model" in plain
    assert "sftd fork r --from-step 0 --changed-model" in again
