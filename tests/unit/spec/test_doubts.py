"""What is possible and hardly meant is a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftd.domain.model.checks import DataFacts
from sftd.domain.plan import warnings as doubts
from sftd.domain.plan.warnings import HostDevices
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from sftd.wire.model.same_files import shared


def spec_of(**overrides: Any) -> Spec:
    config = {"model": {"path": "/m"}, "data": {"train_files": ["/t"], "val_files": ["/v"]}}
    return parse(config, [(k.replace("__", "."), v) for k, v in overrides.items()])[0]


def facts(rows: int = 100, digest: str = "t", unusable: int = 0) -> DataFacts:
    return DataFacts(
        files=["/t"],
        digest=digest,
        rows=rows,
        tokens=1,
        trained_tokens=1,
        longest=1,
        truncated=0,
        unusable=unusable,
    )


def test_a_plain_run_has_no_doubt() -> None:
    assert doubts.doubts(spec_of(), facts(), facts(digest="v"), [], 1000) == []


def test_all_doubts_are_told() -> None:
    spec = spec_of(
        optimizer__lr=0.5,
        data__train_batch_size=500,
        training__packing=True,
        training__micro_batch_size_per_gpu=1000,
        trainer__save_interval=3,
        trainer__val_check_interval=2,
    )
    found = doubts.doubts(spec, facts(), facts(), [], 1000)
    assert [w.where for w in found] == [
        "optimizer.lr",
        "data.train_batch_size",
        "data.val_files",
        "training.micro_batch_size_per_gpu",
        "trainer.save_interval",
    ]


@pytest.mark.parametrize(
    ("lr", "says"), [(0.5, "far above"), (0.011, "far above"), (1e-9, "hardly"), (0.0, "hardly")]
)
def test_a_learning_rate_that_no_such_model_takes(lr: float, says: str) -> None:
    (warning,) = doubts.learning_rate(spec_of(optimizer__lr=lr))
    assert says in warning.what
    assert "1e-6 to 1e-4" in warning.fix


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-5, 1e-8])
def test_a_learning_rate_that_people_use(lr: float) -> None:
    assert doubts.learning_rate(spec_of(optimizer__lr=lr)) == []


@pytest.mark.parametrize(
    ("batch", "rows", "unusable", "says"),
    [
        (5000, 461, 0, "10 to 11 times"),
        (200, 100, 0, "sees each row 2 times"),
        (100, 110, 20, "1 to 2 times"),
    ],
)
def test_a_batch_larger_than_the_data(batch: int, rows: int, unusable: int, says: str) -> None:
    (warning,) = doubts.batch_of_data(spec_of(data__train_batch_size=batch), facts(rows, unusable=unusable))
    assert says in warning.what
    assert f"{rows - unusable} or less" in warning.fix


def test_a_batch_of_all_rows_is_one() -> None:
    assert doubts.batch_of_data(spec_of(data__train_batch_size=100), facts(100)) == []


def test_validation_data_that_is_trained_on() -> None:
    (same,) = doubts.validation_of_training(facts(digest="x"), facts(digest="x"), ["/v"])
    assert "is the training data" in same.what
    (some,) = doubts.validation_of_training(facts(), facts(digest="v"), [f"/v{n}" for n in range(5)])
    assert some.what == "holds files that are trained on: /v0, /v1, /v2 and 2 more"
    assert doubts.validation_of_training(facts(), None, []) == []


def test_files_are_the_same_by_their_contents(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "three"), ("e", "tow")):
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "d")

    def paths(names: str) -> list[str]:
        return [str(tmp_path / name) for name in names.split()]

    assert shared(paths("a b d"), paths("c e link b")) == paths("c link b")
    assert shared(paths("a"), paths("b d")) == []


@pytest.mark.parametrize(
    ("settings", "where", "says"),
    [
        ({"micro_batch_size_per_gpu": 64}, "training.micro_batch_size_per_gpu", "set it to 4 or less"),
        ({"micro_batch_tokens": 2048 * 9}, "training.micro_batch_tokens", f"set it to {4 * 2048} or less"),
    ],
)
def test_a_micro_batch_that_a_step_never_fills(settings: dict[str, int], where: str, says: str) -> None:
    named = {f"training__{key}": value for key, value in settings.items()}
    spec = spec_of(training__packing=True, data__train_batch_size=7, launch__nproc_per_node=2, **named)
    (warning,) = doubts.micro_batch(spec)
    assert (warning.where, says in warning.fix) == (where, True)


def test_a_micro_batch_that_fits_its_share() -> None:
    spec = spec_of(training__packing=True, data__train_batch_size=8, training__micro_batch_size_per_gpu=8)
    assert doubts.micro_batch(spec) == []


@pytest.mark.parametrize(
    ("save", "check", "steps", "says"),
    [
        (3, 2, 100, "at each multiple of 6 and at the last step"),
        (3, 2, 6, "at the last step alone"),
        (4, 2, 100, None),
        (3, 0, 100, None),
        (0, 2, 100, None),
        (100, 30, 50, None),
    ],
)
def test_checkpoints_that_are_never_validated(save: int, check: int, steps: int, says: str | None) -> None:
    spec = spec_of(trainer__save_interval=save, trainer__val_check_interval=check)
    found = doubts.intervals(spec, facts(digest="v"), steps)
    assert [says in w.what for w in found] == ([True] if says else [])
    assert doubts.intervals(spec, None, steps) == []
    no_best = spec_of(checkpoint__keep_best=0, trainer__save_interval=save, trainer__val_check_interval=check)
    assert doubts.intervals(no_best, facts(digest="v"), steps) == []


CPUS, GPUS = HostDevices("box", 0, 2), HostDevices("node", 8, 64)


@pytest.mark.parametrize(
    ("settings", "hosts", "where"),
    [
        ({"device": "cuda"}, [CPUS], "launch.device"),
        ({"device": "cuda"}, [CPUS, GPUS], None),
        ({"device": "cuda", "nproc_per_node": 16}, [CPUS, GPUS], "launch.nproc_per_node"),
        ({"nproc_per_node": 16}, [GPUS], "launch.nproc_per_node"),
        ({"nproc_per_node": 4}, [CPUS], "launch.nproc_per_node"),
        ({"nproc_per_node": 2}, [CPUS], None),
        ({"device": "cpu", "nproc_per_node": 16}, [CPUS, GPUS], None),
        ({"device": "cuda", "launcher": "slurm"}, [CPUS], None),
        ({"device": "cuda"}, [], None),
    ],
)
def test_devices_that_nobody_has(
    settings: dict[str, Any], hosts: list[HostDevices], where: str | None
) -> None:
    spec = spec_of(data__train_batch_size=64, **{f"launch__{key}": value for key, value in settings.items()})
    assert [w.where for w in doubts.devices(spec, hosts)] == ([where] if where else [])


def test_a_doubt_about_devices_names_them() -> None:
    def doubt(hosts: list[HostDevices], **settings: Any) -> tuple[str, str]:
        spec = spec_of(
            data__train_batch_size=64, **{f"launch__{key}": value for key, value in settings.items()}
        )
        (found,) = doubts.devices(spec, hosts)
        return found.what, found.fix

    what, fix = doubt([CPUS, GPUS], nproc_per_node=16)
    assert all(word in what for word in ("16 ranks", "2 known hosts", "at most 8"))
    assert "8 or less" in fix
    what, fix = doubt([CPUS], nproc_per_node=4)
    assert all(word in what for word in ("4 ranks", "2 cores", "box"))
    assert "2 or less" in fix
    what, fix = doubt([CPUS], device="cuda")
    assert "box has no GPU" in what
    assert "launch.device" in fix
    # As many as there are do.
    assert doubts.devices(spec_of(data__train_batch_size=64, launch__nproc_per_node=8), [CPUS, GPUS]) == []
