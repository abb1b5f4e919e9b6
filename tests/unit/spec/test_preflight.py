"""What submit finds out before a device is held: the model, the data, the folder, and every problem of a sweep."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import sftd
from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Refused
from sftd.domain.model.peft import tensors_of
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import OrderStart, Spec, spec_digest
from sftd.domain.submit.facts import SubmitFacts
from sftd.wire import preflight
from sftd.wire.attempt.directory import Order
from sftd.wire.data import dataset
from sftd.wire.model.folder import read_shape, stop_ids
from sftd.wire.model.same_files import shared
from sftd.wire.spec import grid as grids
from tests.builders.plan.model_configs import DENSE

ROWS = {
    "input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9], [5, 6], [7, 2]],
    "attention_mask": [[1, 1, 1], [1, 1], [1, 1, 1, 1], [1, 1], [1, 1]],
    "labels": [[-100, 2, 3], [-100, -100], [-100, 7, 8, 9], [5, 6], [-100, 2]],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one empty weight file, and two data files beside it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(DENSE | {"eos_token_id": 2}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (model / "tokenizer.json").write_text("{}")
    pq.write_table(pa.table(ROWS), tmp_path / "t.parquet")
    pq.write_table(pa.table({key: rows[:2] for key, rows in ROWS.items()}), tmp_path / "v.parquet")
    return tmp_path


def spec_of(folder: Path, *overrides: tuple[str, Any], val: bool = True) -> Spec:
    given = {
        "model": {"partial_pretrain": str(folder / "model")},
        "data": {
            "train_files": [str(folder / "t.parquet")],
            "val_files": [str(folder / "v.parquet")] if val else [],
            "train_batch_size": 2,
            "sequence_length": 8,
        },
        "trainer": {"epochs": 3},
    }
    return parse(given, overrides)[0]


def problems_of(run: Callable[[], object]) -> dict[str, str]:
    with pytest.raises(Refused) as refused:
        run()
    return {p.where: p.what for p in refused.value.problems}


def test_what_is_found_is_told_and_becomes_the_first_event(folder: Path) -> None:
    spec = spec_of(folder)
    found = preflight.inspect(spec, home=folder)
    assert found.val is not None
    assert (found.train.rows, found.train.unusable, found.val.rows, found.val.unusable) == (5, 1, 2, 1)
    # One row of the training data, and the only one of the validation data, train the end of an answer, which is token 2.
    assert (found.train.stopping, found.shape.vocab_size) == (2, 100)
    # 4 usable rows, three times, two a step.
    assert found.planned_steps == 6
    assert {"data.train_files", "data.val_files"} <= {w.where for w in found.warnings}
    event = preflight.submission(spec, found, found.warnings, "ada")
    assert (event.planned_steps, event.user, event.sftd_version) == (6, "ada", sftd.__version__)
    assert event.spec_digest == spec_digest(spec)
    assert msgspec.convert(event.spec, Spec) == spec
    assert event.data["train"] == msgspec.to_builtins(found.train)
    assert event.data["val"] == msgspec.to_builtins(found.val)
    assert event.model == {"path": str(folder / "model"), **msgspec.to_builtins(found.shape)}
    assert event.warnings == [str(w) for w in found.warnings]
    assert event.model_files == found.model_files
    assert set(found.model_files.weights if found.model_files else ()) == {"model.safetensors"}
    proposal = preflight.proposal(spec, found)
    assert (proposal.spec, proposal.planned_steps) == (spec, 6)
    assert (proposal.train_digest, proposal.val_digest) == (found.train.digest, found.val.digest)
    assert found.train.digest != found.val.digest


def test_a_fork_counts_from_where_it_begins_to_read(folder: Path) -> None:
    asked = []

    def start(train: DataFacts) -> OrderStart:
        asked.append(train.digest)
        return OrderStart(10, 6)

    found = preflight.inspect(spec_of(folder), start, home=folder)
    # 12 - 6 samples are left, two a step.
    assert (found.planned_steps, asked) == (13, [found.train.digest])


def test_without_validation_data_nothing_is_said_of_it(folder: Path) -> None:
    spec = spec_of(folder, val=False)
    found = preflight.inspect(spec, home=folder)
    assert found.val is None
    assert preflight.submission(spec, found, [], "ada").data["val"] is None
    assert preflight.proposal(spec, found).val_digest == ""


def test_every_problem_is_told_at_once(folder: Path) -> None:
    (folder / "model/config.json").unlink()
    (folder / "t.parquet").write_bytes(b"none")
    spec = spec_of(folder, ("checkpoint.save_dir", str(folder / "v.parquet/below")))
    assert problems_of(lambda: preflight.inspect(spec, home=folder)).keys() == {
        "checkpoint.save_dir",
        "model.partial_pretrain",
        "data.train_files",
    }


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        ([("scheduler.warmup_steps", 7)], "scheduler.warmup_steps", "7 is more than the 6 steps"),
        ([("trainer.sample_prompts", ["hi"])], "trainer.sample_prompts", ""),
        ([("model.override_config", {"vocab_size": 9})], "data.train_files", ""),
        ([("model.megatron.tensor_model_parallel_size", 8)], "model.megatron.tensor_model_parallel_size", ""),
        ([("checkpoint.save_dir", "a\0b")], "checkpoint.save_dir", "NUL"),
        ([("data.sequence_length", 3), ("data.truncation", "error")], "data.train_files", "1 of 5 rows"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is_wrong(
    folder: Path, overrides: list[tuple[str, Any]], where: str, words: str
) -> None:
    if overrides[0][0] == "trainer.sample_prompts":
        (folder / "model/tokenizer.json").unlink()
    found = problems_of(lambda: preflight.inspect(spec_of(folder, *overrides), home=folder))
    assert words in found[where]


def test_a_warm_up_of_the_whole_run_fits(folder: Path) -> None:
    assert preflight.inspect(spec_of(folder, ("scheduler.warmup_steps", 6)), home=folder).planned_steps == 6


def test_room_is_asked_for_only_where_it_is_asked_about(folder: Path) -> None:
    # No disk has room for a model of this width.
    large = spec_of(folder, ("model.override_config", {"hidden_size": 2**22, "num_hidden_layers": 4000}))
    assert "checkpoint.save_dir" in problems_of(lambda: preflight.inspect(large, home=folder))
    preflight.inspect(large, home=folder, has_room=False)
    preflight.inspect(large)


def test_a_model_that_stops_at_several_tokens(tmp_path: Path) -> None:
    assert stop_ids(str(tmp_path)) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert stop_ids(str(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3, 7, "x"]}')
    assert stop_ids(str(tmp_path)) == (3, 7, 9)
    (tmp_path / "config.json").write_text("[]")
    assert stop_ids(str(tmp_path)) == (3, 7, 9)


def test_the_first_rows_are_those_that_training_sees(folder: Path) -> None:
    path = str(folder / "t.parquet")
    assert list(dataset.first_rows(path, 3, 3, "right")) == [
        ([1, 2, 3], [False, True, True]),
        ([4, 5], [False, False]),
        ([6, 7, 8], [False, True, True]),
    ]
    assert list(dataset.first_rows(path, 9, 3, "left"))[2] == ([7, 8, 9], [False, True, True])
    # The first token's own label is never predicted.
    assert list(dataset.first_rows(path, 9, 3, "left"))[3] == ([5, 6], [False, True])
    assert len(list(dataset.first_rows(path, 9, 3, "left"))) == 5
    assert list(dataset.first_rows(path, 0, 3, "left")) == []


def test_an_order_reads_where_its_last_piece_began() -> None:
    spec = parse(
        {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"], "train_batch_size": 8}}
    )[0]
    order = Order(run_id="r", attempt=1, token="t", spec=spec, planned_steps=9, checkpoint_dir="c")
    assert [order.sample_position(n) for n in (0, 3)] == [0, 24]
    order = msgspec.structs.replace(
        order, order_start=OrderStart(2, 100), order_later=[OrderStart(4, 500), OrderStart(6, 900)]
    )
    assert [order.sample_position(n) for n in (2, 3, 4, 5, 6, 7)] == [100, 108, 500, 508, 900, 908]


def test_files_are_the_same_by_their_contents(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "three"), ("e", "tow")):
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "d")

    def paths(names: str) -> list[str]:
        return [str(tmp_path / name) for name in names.split()]

    assert shared(paths("a b d"), paths("c e link b")) == paths("c link b")
    assert shared(paths("a"), paths("b d")) == []


# Sweeps.


def points(folder: Path, *grid: str, overrides: tuple[str, ...] = ()) -> list[grids.GridPoint]:
    spec = spec_of(folder)
    config = folder / "config.yaml"
    config.write_text(
        json.dumps({"model": msgspec.to_builtins(spec.model), "data": msgspec.to_builtins(spec.data)})
    )
    given = ("trainer.epochs=3", *overrides)
    return grids.points(str(config), given, grids.parse_grid(grid), str(folder), "s", folder)


def test_each_combination_is_a_point_and_the_last_key_changes_fastest(folder: Path) -> None:
    found = points(folder, "optimizer.lr=1e-5,2e-5", "model.megatron.seed=1,2")
    assert [p.values for p in found] == [
        {"optimizer.lr": lr, "model.megatron.seed": seed} for lr in (1e-5, 2e-5) for seed in (1, 2)
    ]
    assert [(p.spec.optimizer.lr, p.spec.model.megatron.seed) for p in found] == [
        (1e-5, 1),
        (1e-5, 2),
        (2e-5, 1),
        (2e-5, 2),
    ]
    assert [p.spec.trainer.experiment_name for p in found][:2] == ["lr 1e-5 seed 1 s", "lr 1e-5 seed 2 s"]
    assert {p.found.planned_steps for p in found} == {6}
    assert all({"data.train_files", "data.val_files"} <= {w.where for w in p.warnings} for p in found)


def test_a_sweep_is_refused_with_the_problems_of_all_points_each_once(folder: Path) -> None:
    found = problems_of(lambda: points(folder, "optimizer.lr=1e-5,-1,-2", "data.sequence_length=8,0"))
    assert {"optimizer.lr", "data.sequence_length"} <= found.keys()
    with pytest.raises(Refused) as refused:
        points(folder, "optimizer.lr=1e-5,-1", "model.megatron.seed=1,2")
    assert len(refused.value.problems) == 1


def test_a_sweep_has_a_thousand_points_at_most(folder: Path) -> None:
    grid = {"model.megatron.seed": [str(n) for n in range(1001)]}
    found = problems_of(lambda: grids.points(None, (), grid, str(folder), "s", folder))
    assert "1001 combinations" in found["--grid"]
    grid = {"model.megatron.seed": [str(n) for n in range(500)], "optimizer.lr": ["-1", "-2"]}
    assert "--grid" not in problems_of(lambda: grids.points(None, (), grid, str(folder), "s", folder))


def test_a_home_that_cannot_hold_checkpoints_is_refused_before_it_must(folder: Path) -> None:
    with pytest.raises(Refused) as refused:
        preflight.inspect(spec_of(folder), home=folder / "v.parquet")
    (problem,) = refused.value.problems
    assert problem.where == "checkpoint.save_dir"
    assert "v.parquet/runs" in problem.what
    assert "SFTD_HOME" in problem.fix
    # A folder of one's own is asked for instead of it.
    named = spec_of(folder, ("checkpoint.save_dir", str(folder / "c")))
    assert preflight.inspect(named, home=folder / "v.parquet", has_room=False).planned_steps == 6


def test_a_folder_that_should_be_a_mount_is_doubted(folder: Path) -> None:
    if not os.access("/", os.W_OK):
        pytest.skip("only who may write into the root folder is not refused")
    spec = spec_of(folder, ("checkpoint.save_dir", "/sftd-no-such-disk/a/b"))
    found = preflight.inspect(spec, home=folder, has_room=False)
    (doubt,) = [w for w in found.warnings if w.where == "checkpoint.save_dir"]
    assert "/sftd-no-such-disk/a/b" in doubt.what
    assert "mount" in doubt.fix


def test_each_point_of_a_sweep_must_have_room_for_its_checkpoints(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model": {"partial_pretrain": str(folder / "model")}}))
    given = (f"data.train_files={folder}/t.parquet", "data.train_batch_size=2", "trainer.epochs=1")
    grid = grids.parse_grid(["model.megatron.seed=1,2"])
    assert len(grids.points(str(config), given, grid, str(folder), "s", folder)) == 2
    home = folder / "v.parquet"
    found = problems_of(lambda: grids.points(str(config), given, grid, str(folder), "s", home))
    assert "v.parquet/runs" in found["checkpoint.save_dir"]


def write_adapter(folder: Path, rank: int = 2) -> None:
    """A PEFT folder for all queries of the model."""
    (folder / "adapter").mkdir(exist_ok=True)
    every = tensors_of(read_shape(str(folder / "model"), {}), rank)
    tensors = {
        name: np.zeros(size, np.float32)
        for name, (projections, size) in every.items()
        if projections == ["q"]
    }
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(settings))


def started(folder: Path) -> Spec:
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q"], "adapter": str(folder / "adapter")}
    return spec_of(folder, *((f"model.lora.{name}", value) for name, value in lora.items()))


def test_an_adapter_is_read_before_a_run_that_starts_from_it(folder: Path) -> None:
    write_adapter(folder)
    preflight.inspect(started(folder), home=folder)
    write_adapter(folder, 3)
    found = problems_of(lambda: preflight.inspect(started(folder), home=folder))
    assert "rank is 3, here 2" in found["model.lora.adapter"]
    preflight.inspect(started(folder), known=SubmitFacts(has_checkpoint=True), home=folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.touch(), "is a file"),
        (lambda path: path.mkdir(), "holds no adapter_config.json"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{}")), "adapter_model.safe"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("[]")), "is not a mapping"),
        (
            lambda path: (path.mkdir(), (path / "adapter_config.json").write_text('{"r": "8"}')),
            "r is not a number",
        ),
        (
            lambda path: (write_adapter(path.parent), (path / "adapter_model.safetensors").write_bytes(b"x")),
            "adapter_model.safetensors cannot be read",
        ),
    ],
)
def test_an_adapter_that_cannot_be_read_is_refused(
    folder: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(folder / "adapter")
    found = problems_of(lambda: preflight.inspect(started(folder), home=folder))
    assert words in found["model.lora.adapter"]
