"""A published checkpoint survives a power cut, and is never newer than the journal: fsync and rename of real ranks, observed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from sftd.domain.log.events import CheckpointPublished, StepCompleted

if TYPE_CHECKING:
    from tests.builders.durability import Trace
    from tests.builders.trainer.trainers import Trainer
    from tests.builders.warm_ranks import WarmTrainer


@pytest.fixture
def trace(warm: WarmTrainer) -> Iterator[Trace]:
    yield warm.holds.trace()
    warm.holds.untrace()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_published_checkpoint_and_its_steps_survive_a_power_cut(
    trainer: Trainer, warm: WarmTrainer, trace: Trace, *, is_async: bool
) -> None:
    spec = trainer.spec(
        2,
        data__val_files=[],
        trainer__save_interval=2,
        checkpoint__async_save=is_async,
        checkpoint__keep_last=9,
    )
    run = trainer.train(warm, trainer.prepare(f"durable-{is_async}", spec))
    published = run.events(CheckpointPublished)
    assert [e.step for e in published] == [2, 4, 6]
    seen = trace.seen()
    folder = run.checkpoint(2).parent
    assert folder not in trace.unnamed(folder.parent)
    for event in published:
        folder = run.checkpoint(event.step)
        assert len(list(folder.iterdir())) > 4, "two ranks' files, Megatron's own and the manifest"
        assert trace.lacks(folder) == []
        # What the journal held when the folder got its name had been synced: all steps up to this one.
        place = next(i for i, s in enumerate(seen) if s["what"] == "rename" and s["path"] == str(folder))
        journal = str(run.attempt.journal)
        synced = [s["state"][1] for s in seen[:place] if s["what"] == "sync" and s["path"] == journal]
        text = run.attempt.journal.read_bytes()
        completed = (
            f'"type":"StepCompleted","v":{StepCompleted.schema_version},"p":{{"step":{event.step},'.encode()
        )
        assert completed in text[: max(synced, default=0)]
    # The manifest is the last file: where it exists, the others do.
    manifests = [i for i, s in enumerate(seen) if s["path"].endswith(".partial/manifest.json")]
    assert len(manifests) == len(published)
    for place in manifests:
        folder = seen[place]["path"].rpartition("/")[0]
        later = [s["path"] for s in seen[place + 1 :] if s["path"].startswith(folder + "/")]
        assert later == []
