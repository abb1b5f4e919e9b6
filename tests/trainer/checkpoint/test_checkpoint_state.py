"""Training continues with what a checkpoint carries: AdamW's state and the settings of a fork by hand-computed values,
random streams that were drawn from, saves while training changes the weights, and steps that are redone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from torch import Tensor

from sftd.domain.log.events import CheckpointPublished, ModelLoaded, StepCompleted
from sftd.domain.spec.spec import spec_digest
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint.directory import delete_folder, reading
from sftd.wire.checkpoint.manifest import Manifest
from tests.builders.patience import until
from tests.builders.trainer.checkpoint_files import contents, tensors, values
from tests.builders.warm_ranks import has_ended

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer
    from tests.builders.warm_ranks import WarmTrainer

SHORT = {"data__val_files": [], "trainer__max_steps": 3, "trainer__save_interval": 1}


@pytest.fixture(scope="module")
def pair(trainer: Trainer, warm: WarmTrainer) -> Run:
    """Two data-parallel ranks that wait for each save."""
    return trainer.train(warm, trainer.prepare("state", trainer.spec(2, **SHORT)))


def resumed(run: Run, step: int) -> dict[str, Any]:
    """What an order says of the checkpoint to continue from."""
    event = next(e for e in run.events(CheckpointPublished) if e.step == step)
    return {"checkpoint": event.path, "checkpoint_digest": event.manifest_digest}


class AdamW:
    """A step of AdamW as its paper has it, of plain tensors in FP64."""

    def __init__(self, beta1: float, beta2: float, eps: float, decay: float) -> None:
        self._settings = beta1, beta2, eps, decay

    def step(
        self, number: int, rate: float, gradient: Tensor, weight: Tensor, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, first and second moment after step `number`."""
        beta1, beta2, eps, decay = self._settings
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        # The layers are stacked in a checkpoint: a norm has one dimension, or two that way.
        weight = weight * (1 - rate * decay)
        top, root = first / (1 - beta1**number), (second / (1 - beta2**number)).sqrt()
        return weight - rate * top / (root + eps), first, second


def moments(found: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, first and second moment."""
    kinds = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    weight, first, second = (found[kind + name].double() for kind in kinds)
    return weight, first, second


FORKED: dict[str, Any] = {
    "optimizer__lr": 5e-3,
    "optimizer__adam_beta1": 0.7,
    "optimizer__adam_beta2": 0.8,
    "optimizer__adam_eps": 1e-3,
    "optimizer__weight_decay": 3.0,
    "optimizer__clip_grad": 0.25,
    "scheduler__warmup_steps": 1,
}


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), (2, {"model__megatron__tensor_model_parallel_size": 2})]
)
def test_a_fork_uses_its_own_settings_with_its_parents_state(
    trainer: Trainer, warm: WarmTrainer, pair: Run, ranks: int, layout: dict[str, Any]
) -> None:
    """Its second step by hand, from the checkpoint of the first. The gradient is the parent's: of the same weights and samples."""
    spec = trainer.spec(ranks, **SHORT | {"trainer__max_steps": 2} | FORKED | layout)
    attempt = trainer.prepare(f"forked-{ranks}", spec, **resumed(pair, 1))
    run = trainer.train(warm, attempt)
    own, parents = run.steps()[2], pair.steps()[2]
    assert own.loss == pytest.approx(parents.loss, rel=1e-6)
    assert own.grad_norm == pytest.approx(parents.grad_norm, rel=1e-5)
    assert own.lr == pytest.approx(5e-3, rel=0.2)
    before, there, after = (
        tensors(folder) for folder in (pair.checkpoint(1), pair.checkpoint(2), run.checkpoint(2))
    )
    parent = pair.attempt.order().spec.optimizer
    clips = [min(1.0, clip / (parents.grad_norm + 1e-6)) for clip in (parent.clip_grad, 0.25)]
    assert clips[1] < clips[0]
    weights = [name for name in before if not name.startswith("optimizer.")]
    assert len(weights) > 5
    for name in weights:
        weight, first, second = moments(before, name)
        _, then, _ = moments(there, name)
        gradient = (then - parent.adam_beta1 * first) / (1 - parent.adam_beta1) * (clips[1] / clips[0])
        decay = 0.0 if "norm" in name else 3.0
        wanted = AdamW(0.7, 0.8, 1e-3, decay).step(2, own.lr, gradient, weight, first, second)
        for kind, want, have in zip(("weight", "first", "second"), wanted, moments(after, name), strict=True):
            scale = want.abs().max()
            assert (have - want).abs().max() < 2e-5 * scale, f"{kind} of {name}"


def test_random_streams_go_on_where_each_rank_stood(trainer: Trainer, warm: WarmTrainer) -> None:
    """Nothing in sftd's models draws numbers yet, so the ranks are made to: from both streams, each another number of times."""
    draws = [("draws_numbers", {})]
    whole = trainer.train(warm, trainer.prepare("drawn", trainer.spec(2, **SHORT)), faults=draws)
    attempt = trainer.prepare("drawn-2", whole.attempt.order().spec, **resumed(whole, 1))
    again = trainer.train(warm, attempt, faults=draws)
    for rank in range(2):
        drawn = [values(whole.checkpoint(step), f"rng/shard_0.0.{rank}") for step in (1, 2, 3)]
        (at_end,) = values(again.checkpoint(3), f"rng/shard_0.0.{rank}")
        (first,), (second,), (third,) = drawn
        for one, other, end in ((first, second, None), (second, third, at_end)):
            assert not torch.equal(one["cpu"], other["cpu"]), "nothing was drawn"
            assert any(not torch.equal(one["streams"][n], s) for n, s in other["streams"].items())
            if end is not None:
                assert torch.equal(end["cpu"], other["cpu"])
                assert end["streams"].keys() == other["streams"].keys()
                assert all(torch.equal(end["streams"][n], s) for n, s in other["streams"].items())
    assert contents(again, 3) == contents(whole, 3)
    numbers = ("loss", "grad_norm", "lr", "epoch", "tokens_total", "samples_digest")
    for step, event in again.steps().items():
        was = whole.steps()[step]
        assert [getattr(event, name) for name in numbers] == [getattr(was, name) for name in numbers]
    assert sorted(again.steps()) == [2, 3]


@pytest.mark.parametrize("is_short", [False, True], ids=["copied", "no-room-for-one-copy"])
def test_a_save_while_training_goes_on_has_the_weights_of_its_step(
    trainer: Trainer, warm: WarmTrainer, pair: Run, tmp_path: Path, *, is_short: bool
) -> None:
    """No file is begun before training is a step further, or waits. Where one rank has no room for a copy, both wait."""
    attempt = trainer.prepare(f"async-{is_short}", trainer.spec(2, **SHORT, checkpoint__async_save=True))
    note = tmp_path / "note"
    held = {"path": r"\.partial/__", "journal": str(attempt.journal), "ahead": 1, "note": str(note)}
    faults: list[Any] = [("hold_while_training", held)]
    if is_short:
        faults.append(("little_memory", {"rank": 1}))
    run = trainer.train(warm, attempt, faults=faults)
    assert [e.step for e in run.events(CheckpointPublished)] == [1, 2, 3]
    assert ("over" in note.read_text().split("\n")) != is_short
    for step, event in run.steps().items():
        assert contents(run, step) == contents(pair, step)
        found = manifests.read(run.checkpoint(step), None)
        assert (found.step, found.loss, found.grad_norm) == (step, event.loss.hex(), event.grad_norm.hex())
        assert (found.tokens_total, found.samples) == (event.tokens_total, 8 * step)


def replaced(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = msgspec.structs.replace(manifests.read(folder, None), **fields)
        (folder / manifests.NAME).write_bytes(manifests.encode(whole))

    return change


def flipped(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def torn(folder: Path) -> None:
    path = folder / manifests.NAME
    path.write_bytes(path.read_bytes()[:-100])


OTHERS: dict[str, Callable[[Path], None]] = {
    "a loss": replaced(loss=(5.0).hex()),
    "a gradient norm": replaced(grad_norm=(1.0).hex()),
    "a number of tokens": replaced(tokens_total=1),
    "a run": replaced(run_id="other"),
    "a spec": replaced(spec_digest="other"),
    "a step": replaced(step=1),
    "no training state": replaced(schema_version=manifests.WEIGHTS_ONLY),
    "a damaged file": flipped,
    "a torn manifest": torn,
}


def of_data(found: Manifest) -> Manifest:
    """Without `.metadata`, which is another one at each save."""
    return msgspec.structs.replace(found, files=[f for f in found.files if f.name != ".metadata"])


def test_a_redone_step_replaces_what_is_not_the_same_checkpoint(trainer: Trainer, warm: WarmTrainer) -> None:
    """One attempt redoes a step for each way in which a checkpoint that is there already may be another one."""
    spec = trainer.spec(**SHORT | {"trainer__max_steps": len(OTHERS) + 2})
    first = trainer.train(warm, trainer.prepare("to-redo", spec))
    there: dict[int, tuple[Manifest, int]] = {}
    for step, change in enumerate([*OTHERS.values(), lambda folder: None], 2):
        folder = first.checkpoint(step)
        there[step] = manifests.verify(folder, None), folder.stat().st_ino
        change(folder)
    folder = str(first.checkpoint(1).parent)
    attempt = trainer.prepare("redoing", spec, **resumed(first, 1), checkpoint_dir=folder)
    run = trainer.train(warm, attempt)
    published = {e.step: e.manifest_digest for e in run.events(CheckpointPublished)}
    assert sorted(published) == sorted(there)
    for (step, (was, number)), other in zip(there.items(), [*OTHERS, None], strict=True):
        assert of_data(manifests.verify(run.checkpoint(step), published[step])) == of_data(was), other
        # What is the same is left alone: somebody may be reading it.
        assert (run.checkpoint(step).stat().st_ino == number) == (other is None), other
    assert sorted(p.name for p in Path(folder).iterdir()) == [
        f"step-{n:08d}" for n in range(1, len(OTHERS) + 3)
    ]


def test_a_redone_step_of_other_weights_replaces_the_checkpoint(
    trainer: Trainer, warm: WarmTrainer, pair: Run, tmp_path: Path
) -> None:
    """Its numbers are others because it starts from other weights, as where a device computes otherwise."""
    spec = trainer.spec(2, **SHORT)
    other = trainer.train(warm, trainer.prepare("other", trainer.spec(2, **SHORT, optimizer__lr=3e-3)))
    shutil.copytree(pair.checkpoint(1).parent, tmp_path / "checkpoints")
    attempt = trainer.prepare(
        "redone-otherwise", spec, **resumed(other, 1), checkpoint_dir=str(tmp_path / "checkpoints")
    )
    run = trainer.train(warm, attempt)
    for event in run.events(CheckpointPublished):
        kept = manifests.verify(run.checkpoint(event.step), event.manifest_digest)
        assert float.fromhex(kept.loss) == run.steps()[event.step].loss != pair.steps()[event.step].loss
    assert [s.step for s in run.events(StepCompleted)] == [2, 3]


def test_a_manifest_says_what_the_log_says(pair: Run) -> None:
    """Every field of each, and the bytes of the folder."""
    order, environment = pair.attempt.order(), pair.events(ModelLoaded)[0].environment
    for event in pair.events(CheckpointPublished):
        folder, step = pair.checkpoint(event.step), pair.steps()[event.step]
        found = manifests.verify(folder, event.manifest_digest)
        assert found == Manifest(
            schema_version=manifests.WHOLE,
            run_id="run",
            spec_digest=spec_digest(order.spec),
            step=event.step,
            tokens_total=sum(s.tokens for n, s in pair.steps().items() if n <= event.step),
            samples=8 * event.step,
            loss=step.loss.hex(),
            grad_norm=step.grad_norm.hex(),
            layout={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "dp": 2},
            dtype="float32",
            versions={name: environment[name] for name in ("sftd", "python", "torch", "megatron_core")},
            files=found.files,
            state_files=["__0_state_0.distcp", "__1_state_0.distcp"],
        )
        assert event.path == str(folder)
        assert event.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_weights_in_bf16_go_on_from_their_master_copies(trainer: Trainer, warm: WarmTrainer) -> None:
    spec = trainer.spec(**SHORT, model__megatron__params_dtype="bfloat16")
    whole = trainer.train(warm, trainer.prepare("bf16", spec))
    again = trainer.train(warm, trainer.prepare("bf16-2", spec, **resumed(whole, 1)))
    assert contents(again, 3) == contents(whole, 3)
    assert [s.loss for s in again.events(StepCompleted)] == [s.loss for s in whole.events(StepCompleted)[1:]]


def test_a_save_in_flight_is_published_before_a_loss_that_is_no_number_ends_the_attempt(
    trainer: Trainer, warm: WarmTrainer, tmp_path: Path
) -> None:
    """The next attempt starts from it."""
    spec = trainer.spec(**SHORT, optimizer__lr=1e30, scheduler__warmup_steps=0, checkpoint__async_save=True)
    attempt = trainer.prepare("diverging-while-saving", spec)
    held = {
        "path": r"\.partial/__",
        "journal": str(attempt.journal),
        "ahead": 9,
        "note": str(tmp_path / "note"),
    }
    run = trainer.train(warm, attempt, expect=1, faults=[("hold_while_training", held)])
    assert [s.step for s in run.events(StepCompleted)] == [1, 2]
    assert [c.step for c in run.events(CheckpointPublished)] == [1]
    assert run.all_events()[-1] == run.events(CheckpointPublished)[0]


def test_a_checkpoint_is_not_deleted_while_an_attempt_loads_it(
    trainer: Trainer, warm: WarmTrainer, pair: Run, tmp_path: Path
) -> None:
    folder, reached, go = tmp_path / "step-00000002", tmp_path / "reached", tmp_path / "go"
    shutil.copytree(pair.checkpoint(2), folder)
    attempt = trainer.prepare("held-open", trainer.spec(2, **SHORT), checkpoint=str(folder))
    place = {"rank": 1, "path": r"/\.metadata$", "reached": str(reached), "go": str(go)}
    ranks = trainer.start_warm(warm, attempt, [("waits_at", place)])
    until(lambda: reached.exists() or all(map(has_ended, ranks.pids)))
    try:
        assert not delete_folder(folder)
    finally:
        go.touch()
    assert [s.step for s in trainer.ended(attempt, ranks).events(StepCompleted)] == [3]
    assert delete_folder(folder)


def test_a_checkpoint_that_is_read_is_not_replaced_meanwhile(
    trainer: Trainer, warm: WarmTrainer, pair: Run, tmp_path: Path
) -> None:
    """The attempt sleeps until the reader is through."""
    shutil.copytree(pair.checkpoint(1).parent, tmp_path / "checkpoints")
    folder, note = tmp_path / "checkpoints" / "step-00000002", tmp_path / "note"
    replaced(loss=(5.0).hex())(folder)
    number = folder.stat().st_ino
    attempt = trainer.prepare(
        "replacing",
        trainer.spec(2, **SHORT | {"trainer__max_steps": 2}),
        **resumed(pair, 1),
        checkpoint_dir=str(folder.parent),
    )
    after = f"{folder}.partial/{manifests.NAME}"
    with reading(folder):
        ranks = trainer.start_warm(warm, attempt, [("notes_sleep", {"after": after, "note": str(note)})])
        until(lambda: note.exists() or all(map(has_ended, ranks.pids)))
        assert folder.stat().st_ino == number
    run = trainer.ended(attempt, ranks)
    (published,) = run.events(CheckpointPublished)
    manifests.verify(folder, published.manifest_digest)
    assert folder.stat().st_ino != number
