"""All bytes of the weights are digested by the ranks of each host together, and compared before a step counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftd.domain.log.events import StepCompleted, WeightsDigested
from sftd.trainer.checkpoint import weights_digest
from sftd.trainer.checkpoint.weights_digest import WeightsDigest
from sftd.trainer.errors import UserError
from tests.builders.trainer.trainers import Trainer
from tests.builders.warm_ranks import WarmTrainer

Digest = Callable[..., WeightsDigested]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weight files of 25 and of 7 small pieces; none of the digest cares what they hold."""
    (tmp_path / "a.safetensors").write_bytes(bytes(range(250)) * 10)
    (tmp_path / "b.safetensors").write_bytes(b"b" * 699)
    return tmp_path


@pytest.fixture
def digest(monkeypatch: pytest.MonkeyPatch) -> Digest:
    """Digests folders on ranks of several hosts, one folder a host."""
    monkeypatch.setattr(weights_digest, "_PIECE", 100)
    monkeypatch.setattr(weights_digest, "_BLOCK", 30)

    def run(*hosts: Path, ranks: int = 1, recorded: dict[str, str] | None = None) -> WeightsDigested:
        shares: list[Any] = []
        made: list[tuple[WeightsDigest, int, int]] = []
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        for host, path in enumerate(hosts):
            for rank in range(ranks):
                monkeypatch.setenv("LOCAL_RANK", str(rank))
                made.append((WeightsDigest(str(path), is_cpu=False), host * ranks + rank, rank))

        def finish(number: int, gather: Callable[[Any], list[Any]]) -> WeightsDigested:
            digester, rank, local = made[number]
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(local))
            return digester.finish(gather, recorded or {}, "brave-otter")

        class Gathered(Exception):
            pass

        def collect(value: Any) -> list[Any]:
            shares.append(value)
            raise Gathered

        for number in range(len(made)):
            with pytest.raises(Gathered):
                finish(number, collect)
        return finish(0, lambda value: shares)

    return run


def test_any_number_of_ranks_and_hosts_finds_the_same(folder: Path, tmp_path: Path, digest: Digest) -> None:
    one = digest(folder)
    assert list(one.files) == ["a.safetensors", "b.safetensors"]
    assert one.bytes == 3199
    for ranks in (2, 3, 40):
        assert digest(folder, ranks=ranks).files == one.files
    assert digest(folder, folder, ranks=2, recorded=one.files).files == one.files


def test_one_changed_byte_is_found_wherever_it_is(folder: Path, digest: Digest) -> None:
    recorded = digest(folder).files
    for offset in (0, 99, 100, 2499):
        data = bytearray(range(250)) * 10
        data[offset] ^= 1
        (folder / "a.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"first attempt .*a.safetensors holds other weights") as error:
            digest(folder, ranks=2, recorded=recorded)
        assert "sftd fork brave-otter --from-step 0 --changed-model" in str(error.value)


def test_a_host_with_another_folder_is_found(folder: Path, tmp_path: Path, digest: Digest) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copyfile(folder / name, other / name)
    digest(folder, other)
    (other / "b.safetensors").write_bytes(b"b" * 698 + b"c")
    with pytest.raises(UserError, match=r"hosts hold different weights.*b.safetensors"):
        digest(folder, other, ranks=2)


def test_a_folder_that_cannot_be_read_is_an_error_of_all_ranks(
    folder: Path, digest: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = WeightsDigest._work

    def fail(self: WeightsDigest) -> None:
        shutil.rmtree(folder)
        broken(self)

    monkeypatch.setattr(WeightsDigest, "_work", fail)
    with pytest.raises(OSError, match=r"the weights cannot be read: .*a\.safetensors"):
        digest(folder)


def test_a_missing_file_is_an_error_of_the_user(folder: Path, digest: Digest) -> None:
    index = {"weight_map": {"x": "a.safetensors", "y": "c.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"the weights in .* cannot be read: .*c\.safetensors"):
        digest(folder)


def test_no_step_is_recorded_that_came_of_other_weights(warm: WarmTrainer, trainer: Trainer) -> None:
    good = trainer.prepare("recorded", trainer.spec(2, trainer__max_steps=2))
    [found] = trainer.train(warm, good).events(WeightsDigested)
    spec = trainer.spec(2, trainer__max_steps=2)
    again = trainer.train(warm, trainer.prepare("again", spec, weights=found.files))
    assert again.events(WeightsDigested)[0].files == found.files
    other = trainer.prepare("other", spec, weights=dict.fromkeys(found.files, "0" * 64))
    failed = trainer.train(warm, other, expect=1)
    assert "UserError" in failed.output + failed.errors()
    assert failed.events(StepCompleted) == failed.events(WeightsDigested) == []
