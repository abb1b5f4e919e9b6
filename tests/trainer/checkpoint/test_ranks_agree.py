"""What one rank finds, all ranks act on: a damaged checkpoint, a disk that is full for one, a signal to one, a loss that only
one has. In each case the rank that knows is neither rank 0 nor the one that writes the journal, if both can be helped."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from sftd.domain.errors import CheckpointInvalid
from sftd.domain.log.events import (
    AnomalyDetected,
    CheckpointPublished,
    CheckpointRejected,
    StepCompleted,
    TrainingResumed,
    WeightsDigested,
)
from sftd.wire.checkpoint import manifest as manifests
from tests.builders.trainer.checkpoint_files import contents, tensors

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import Fault, WarmTrainer

SHORT = {"data__val_files": [], "trainer__max_steps": 2, "trainer__save_interval": 1}
PP2 = {"model__megatron__pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def pair(trainer: Trainer, warm: WarmTrainer) -> Run:
    """Two data-parallel ranks."""
    return trainer.train(warm, trainer.prepare("agree", trainer.spec(2, **SHORT)))


def share(folder: Path, rank: int) -> list[str]:
    """The files that one of two ranks hashes."""
    return [entry.name for entry in manifests.read(folder, None).files[rank::2]]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def weights(folder: Path) -> str:
    """Damage that rank 1 finds."""
    name = "__0_0.distcp"
    assert name in share(folder, 1)
    flip(folder / name)
    return f"{name} has sha256"


def state(folder: Path) -> str:
    name = "__1_state_0.distcp"
    assert name in share(folder, 1)
    flip(folder / name)
    return f"{name} has sha256"


def index(folder: Path) -> str:
    """Damage that rank 0 finds, which does not write the journal of two pipeline stages."""
    assert ".metadata" in share(folder, 0)
    flip(folder / ".metadata")
    return ".metadata has sha256"


def nothing(folder: Path) -> str:
    return "cannot be read"


def streams(folder: Path) -> str:
    """Random streams of rank 1 that torch does not take, in a checkpoint whose digests are right."""
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    (place,) = (i for i in metadata.storage_data if i.fqn.startswith("rng/shard_0.0.1"))
    where = metadata.storage_data[place]
    written = io.BytesIO()
    torch.save([{"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": None, "streams": {}}], written)
    with open(folder / where.relative_path, "ab") as file:
        metadata.storage_data[place] = type(where)(where.relative_path, file.tell(), written.tell())
        file.write(written.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    files = manifests.describe(folder, manifests.list_files(folder))
    whole = msgspec.structs.replace(manifests.read(folder, None), files=files)
    (folder / manifests.NAME).write_bytes(manifests.encode(whole))
    return "cannot be read although its files are those that were published"


def unreadable(name: str, code: str) -> Fault:
    path = rf"step-00000001/{name}$"
    return "cannot_open", {"rank": 1, "path": path, "code": code, "writing": False}


@pytest.mark.parametrize(
    ("damage", "layout", "faults"),
    [
        (weights, {}, []),
        (state, {}, []),
        (index, PP2, []),
        (streams, {}, []),
        (nothing, {}, [unreadable("manifest.json", "ENOENT")]),
        (nothing, {}, [unreadable("__0_0.distcp", "EIO")]),
    ],
    ids=["weights", "state", "index", "streams", "manifest-not-there", "unreadable"],
)
def test_all_ranks_refuse_the_checkpoint_that_one_finds_damaged(
    trainer: Trainer,
    warm: WarmTrainer,
    pair: Run,
    tmp_path: Path,
    damage: Callable[[Path], str],
    layout: dict[str, Any],
    faults: list[Fault],
) -> None:
    folder = tmp_path / "step-00000001"
    shutil.copytree(pair.checkpoint(1), folder)
    reason = damage(folder)
    attempt = trainer.prepare("refused", trainer.spec(2, **SHORT | layout), checkpoint=str(folder))
    run = trainer.train(warm, attempt, expect=1, faults=faults)
    (rejected,) = run.events(CheckpointRejected)
    assert (rejected.step, rejected.path) == (1, str(folder))
    assert reason in rejected.reason
    assert not run.events(TrainingResumed)
    # Each rank says so: the daemon reads why an attempt ended off whichever was the first to end.
    assert run.output.count("CheckpointInvalid: ") == 2


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_disk_that_is_full_for_one_rank_costs_a_checkpoint_and_no_step(
    trainer: Trainer, warm: WarmTrainer, pair: Run, *, is_async: bool
) -> None:
    spec = trainer.spec(2, **SHORT, checkpoint__async_save=is_async)
    full = {"rank": 1, "path": r"step-00000001\.partial/__1_", "code": "ENOSPC", "writing": True}
    attempt = trainer.prepare(f"full-for-one-{is_async}", spec)
    run = trainer.train(warm, attempt, faults=[("cannot_open", full)])
    assert [(a.step, a.what) for a in run.events(AnomalyDetected)] == [(1, "checkpoint_failed")]
    assert "No space left on device" in run.events(AnomalyDetected)[0].detail["error"]
    assert [e.step for e in run.events(CheckpointPublished)] == [2]
    assert [path.name for path in run.checkpoint(2).parent.iterdir()] == ["step-00000002"]
    assert contents(run, 2) == contents(pair, 2)


def test_a_folder_that_the_second_node_cannot_write_is_found_before_the_first_step(
    trainer: Trainer, warm: WarmTrainer
) -> None:
    read_only = {"rank": 1, "path": r"/\.sftd-probe-", "code": "EROFS", "writing": True}
    attempt = trainer.prepare("read-only-there", trainer.spec(2, **SHORT))
    faults: list[Fault] = [("is_a_node", {"rank": 1}), ("cannot_open", read_only)]
    run = trainer.train(warm, attempt, expect=1, faults=faults)
    assert run.all_events() == []
    assert run.output.count("UserError: checkpoints cannot be written: ") == 2
    assert "Read-only file system" in run.output


def test_weights_that_one_rank_cannot_digest_count_no_step(trainer: Trainer, warm: WarmTrainer) -> None:
    """The digest of the others' pieces alone would go into the log, and refuse each later attempt. Rank 0 digests, rank 1
    writes the journal."""
    unread = {"rank": 0, "path": r"/model\.safetensors$", "code": "EIO", "writing": False}
    attempt = trainer.prepare("undigested", trainer.spec(2, **SHORT | PP2))
    run = trainer.train(warm, attempt, expect=1, faults=[("cannot_open", unread)])
    assert not run.events(StepCompleted)
    assert not run.events(WeightsDigested)
    assert run.output.count("OSError: the weights cannot be read: ") == 2


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_checkpoint_is_published_when_every_rank_has_its_files_on_the_disk(
    trainer: Trainer, warm: WarmTrainer, pair: Run, tmp_path: Path, *, is_async: bool
) -> None:
    """Rank 1 is held in the write of its files. The disk returns another byte than it wrote to those of the second save: the
    manifest has the digest of what was written, not of what rank 0 finds."""
    attempt = trainer.prepare(
        f"held-writer-{is_async}", trainer.spec(2, **SHORT, checkpoint__async_save=is_async)
    )
    published, note = Path(attempt.order().checkpoint_dir, "step-00000001"), tmp_path / "note"
    held = {
        "rank": 1,
        "path": r"step-00000001\.partial/__1_",
        "until_exists": str(published),
        "note": str(note),
    }
    altered = {"rank": 1, "path": r"step-00000002\.partial/__1_"}
    run = trainer.train(warm, attempt, faults=[("hold_write", held), ("disk_alters", altered)])
    assert set(note.read_text().split("\n")) == {"main waits", ""}, "published before its files were there"
    assert [e.step for e in run.events(CheckpointPublished)] == [1, 2]
    assert contents(run, 1) == contents(pair, 1)
    with pytest.raises(CheckpointInvalid, match=r"__1_state_0.distcp has sha256"):
        manifests.verify(run.checkpoint(2), None)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(trainer: Trainer, warm: WarmTrainer) -> None:
    spec = trainer.spec(2, **SHORT | {"trainer__max_steps": 60, "trainer__save_interval": 0})
    attempt = trainer.prepare("one-signalled", spec)
    warm.holds.at(attempt.path, 1)
    ranks = trainer.start_warm(warm, attempt)
    reporter = ranks.held(attempt.path)
    other = next(pid for pid in ranks.pids if pid != reporter.pid)
    os.kill(other, signal.SIGTERM)
    reporter.resume()
    run = trainer.ended(attempt, ranks)
    assert [s.step for s in run.events(StepCompleted)] == [1, 2]
    assert [c.step for c in run.events(CheckpointPublished)] == [2]


def test_ranks_judge_the_loss_of_all_when_they_skip_a_step(trainer: Trainer, warm: WarmTrainer) -> None:
    """Each of two ranks has about half of the loss: 0.7 of the median lies between a half and the whole."""
    spec = trainer.spec(
        2,
        **SHORT | {"trainer__max_steps": 17, "trainer__save_interval": 16},
        training__on_spike="skip",
        training__spike_factor=0.7,
    )
    run = trainer.train(warm, trainer.prepare("skip-by-sum", spec))
    (skipped,) = run.events(AnomalyDetected)
    assert (skipped.step, skipped.what, skipped.detail["policy"]) == (17, "loss_spike", "skip")
    before, after = (tensors(run.checkpoint(step)) for step in (16, 17))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
