"""Runs written to a database event by event, without a daemon, for tests of commands that only read."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from sftd.domain.log import events as e
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.sections import Optimizer, Trainer
from sftd.domain.spec.spec import Spec, spec_digest
from sftd.projections import views
from sftd.store.database.engine import Store, open_engine
from sftd.store.log import event_store

SECOND = 1_000_000
NOON = 1_790_000_000 * SECOND
ENVIRONMENT: dict[str, Any] = {"torch": "2.11", "dtype": "float32", "deterministic": True, "variables": {}}


def open_log(url: str) -> Store:
    """The store with its views, as the command line opens it."""
    return Store(open_engine(url), before_commit=(views.catch_up,))


def spec(*, lr: float = 1e-4, steps: int = 10, name: str = "") -> Spec:
    return Spec(
        model=Model(partial_pretrain="m"),
        data=Data(train_files=["t"]),
        optimizer=Optimizer(lr=lr),
        trainer=Trainer(max_steps=steps, experiment_name=name),
    )


def submitted(of: Spec, digest: str = "d" * 64) -> e.RunSubmitted:
    return e.RunSubmitted(
        spec=msgspec.to_builtins(of),
        spec_digest=spec_digest(of),
        planned_steps=of.trainer.max_steps or 0,
        user="ada",
        data={"train": {"digest": digest}},
        model={},
        sftd_version="1",
    )


def claimed(from_step: int = 0, devices: int = 2, **environment: Any) -> list[e.Event]:
    """An attempt begins on `devices` devices."""
    return [
        e.AttemptClaimed(daemon="d", host="h", from_step=from_step),
        e.AttemptLaunched(
            pid=1,
            create_time=1.0,
            host="h",
            directory="d",
            argv=[],
            devices=[f"cpu:{n}" for n in range(devices)],
        ),
        e.ModelLoaded(
            architecture="a",
            parameters=1,
            dtype="float32",
            device="cpu",
            seconds=1.0,
            environment=ENVIRONMENT | environment,
        ),
    ]


def step(number: int, loss: float = 1.0, **changes: Any) -> e.StepCompleted:
    values: dict[str, Any] = {
        "grad_norm": 1.0,
        "lr": 1e-4,
        "tokens": 10,
        "samples_digest": f"{number:064x}",
        "seconds": 1.0,
        "mfu": 0.5,
    }
    return e.StepCompleted(
        step=number,
        epoch=0,
        loss=loss,
        tokens_real=20,
        tokens_padded=20,
        tokens_total=10 * number,
        samples=1,
        peak_memory_bytes=2_000_000,
        **(values | changes),
    )


def append(
    store: Store, run_id: str, events: Sequence[e.Event], attempt: int | None = 1, at: int = NOON
) -> None:
    """Append events, a second apart, to what the run's stream has."""
    with store.write() as tx:
        before = len(event_store.event_types(tx.connection, run_id))
        new = [
            e.NewEvent(
                event=event,
                event_id=str(uuid.uuid4()),
                occurred_at=at + (before + n) * SECOND,
                actor="test",
                attempt=None if isinstance(event, e.RunSubmitted | e.RunForked) else attempt,
            )
            for n, event in enumerate(events)
        ]
        event_store.append(tx, run_id, before, new, at)


SUCCEEDED = e.RunSucceeded(steps=1, tokens=1, final_checkpoint="p")
FAILED = e.AttemptFailed(cause="crash", message="boom", exit_code=1)


def published(number: int, digest: str = "m") -> e.CheckpointPublished:
    return e.CheckpointPublished(step=number, path=f"p{number}", bytes=1, manifest_digest=digest, seconds=1.0)


def forked(parent: str, at: int, digest: str = "m") -> e.RunForked:
    return e.RunForked(
        parent=parent,
        step=at,
        sample=0,
        checkpoint=f"p{at}",
        manifest_digest=digest,
        bytes=1,
        tokens_total=10 * at,
        changes={},
        by="ada",
    )
