"""A run's stream in memory, built by the decisions that the daemon takes."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.log import events
from sftd.domain.log.events import Event, Recorded
from sftd.domain.run import decisions
from sftd.domain.run.failures import Failure
from sftd.domain.run.fold import evolve
from sftd.domain.run.state import Run
from sftd.domain.spec.parse import parse

CRASH = Failure("crash", "rank 0: ValueError: boom", ["ValueError: boom"])
TOKENS = 100


class Log:
    """A run's stream in memory."""

    def __init__(self, planned: int = 40, **overrides: Any) -> None:
        config = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"]}}
        spec, _ = parse(config, [(k.replace("__", "."), v) for k, v in overrides.items()])
        self.recorded: list[Recorded] = []
        self.run = Run("brave-otter-3f2a")
        self.add(
            events.RunSubmitted(
                spec=msgspec.to_builtins(spec),
                spec_digest="s",
                planned_steps=planned,
                user="ada",
                data={},
                model={},
                sftd_version="0",
            )
        )

    def add(self, *new: Event) -> Log:
        for event in new:
            version = len(self.recorded) + 1
            recorded = Recorded(
                position=version,
                event_id=str(version),
                run_id=self.run.run_id,
                version=version,
                type=type(event).__name__,
                schema_version=1,
                occurred_at=version * 1_000_000,
                recorded_at=version * 1_000_000,
                attempt=self.run.attempt or None,
                actor="test",
                causation_id=None,
                event=event,
            )
            if isinstance(event, events.AttemptClaimed):
                recorded = msgspec.structs.replace(recorded, attempt=self.run.attempt + 1)
            self.recorded.append(recorded)
            self.run = evolve(self.run, recorded)
        return self

    def claim(self) -> Log:
        self.add(decisions.claim(self.run, "daemon", "host"))
        checkpoint = next((c for c in self.run.checkpoints if c.step == self.run.step), None)
        if checkpoint:
            self.add(
                events.TrainingResumed(
                    step=checkpoint.step, path=checkpoint.path, tokens_total=checkpoint.tokens_total
                )
            )
        return self

    def train(self, until: int, *, save_every: int = 0, tokens: int = TOKENS) -> Log:
        for number in range(self.run.step + 1, until + 1):
            self.add(step(number, tokens=tokens))
            if save_every and number % save_every == 0:
                self.save()
        return self

    def save(self) -> Log:
        number = self.run.step
        return self.add(events.CheckpointStarted(step=number), published(number))

    def end(self, failure: Failure = CRASH, exit_code: int | None = 1, *, lost: bool = False) -> Log:
        return self.add(
            *decisions.end_attempt(
                self.run, exit_code=exit_code, failure=failure, lost=lost, now=0, backoff_base=15.0
            )
        )

    @property
    def types(self) -> list[str]:
        return [r.type for r in self.recorded]


def step(number: int, loss: float = 2.0, tokens: int = TOKENS, **changes: Any) -> events.StepCompleted:
    made = events.StepCompleted(
        step=number,
        epoch=0,
        loss=loss,
        grad_norm=1.0,
        lr=1e-5,
        tokens=tokens,
        tokens_real=tokens * 2,
        tokens_padded=tokens * 3,
        tokens_total=number * TOKENS,
        samples=8,
        samples_digest=f"d{number}",
        seconds=0.5,
    )
    return msgspec.structs.replace(made, **changes)


def published(number: int) -> events.CheckpointPublished:
    return events.CheckpointPublished(
        step=number, path=f"/ck/step-{number}", bytes=10, manifest_digest="m", seconds=1.0
    )


def validated(number: int, loss: float) -> events.ValidationCompleted:
    return events.ValidationCompleted(step=number, loss=loss, tokens=9, rows=3, seconds=1.0)
