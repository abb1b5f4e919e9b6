"""Kills a run at seeded random moments of its saves and deletions, again and again, and looks at what is left.

The run is made directly, so that one process trains, saves, publishes, deletes what retention does not keep, and decides
where the next attempt starts; and it is forked from a warm parent, so that a trial takes a second. After every kill:

- every folder with the name of a checkpoint verifies, file by file;
- every checkpoint that the log says retention keeps is there, and is the one that was published;
- the next attempt starts from the newest of them, and every step it computes is that of the undisturbed run, bit for bit.

At a run's end its last checkpoint holds the same bytes as the undisturbed run's, and another run is begun.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sftd.domain.errors import CheckpointInvalid
from sftd.domain.log import events as e
from sftd.domain.run.retention import why_kept
from sftd.domain.run.state import Run
from sftd.wire.attempt import journal
from sftd.wire.attempt.direct_run import DirectRun, read_history
from sftd.wire.checkpoint import manifest as manifests
from tests.builders.patience import holds_within, until
from tests.builders.warm_ranks import Ranks, WarmTrainer, has_ended

STEPS = 14
# What a kill waits for, how often it is taken, and how long after it a kill may come at most: in saves, or in seconds.
AIMS: dict[str, tuple[type[e.Event], float]] = {
    "a save": (e.CheckpointStarted, 0.6),
    "a publication": (e.CheckpointPublished, 0.2),
    "a deletion": (e.CheckpointDeleted, 0.2),
}
_SAVES, _SECONDS = 1.3, 0.006
_NAME = re.compile(r"step-\d{8}")
Found = Literal[
    "nothing", "a part", "all but its name", "a checkpoint without an event", "a half-deleted one"
]


@dataclass
class Tally:
    """What was done, and everything that must not be: an empty `wrong` is what all this is for."""

    kills: int = 0
    runs: int = 0
    steps: int = 0
    verified: int = 0
    aims: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class KillWhileSaving:
    """Trials of one kind: saves that training waits for, or not."""

    def __init__(
        self, warm: WarmTrainer, folder: Path, model: Path, data: Path, seed: int, *, is_async: bool
    ) -> None:
        """`data` has train.parquet and val.parquet."""
        folder.mkdir(parents=True)
        self._warm = warm
        self._folder = folder
        self._random = random.Random(seed)
        self._config = folder / "run.yaml"
        config = {
            "model": {"partial_pretrain": str(model)},
            "data": {
                "train_files": [str(data / "train.parquet")],
                "val_files": [str(data / "val.parquet")],
                "train_batch_size": 8,
                "sequence_length": 64,
            },
            "optimizer": {"lr": 1e-3},
            "trainer": {
                "max_steps": STEPS,
                "save_interval": 2,
                "val_check_interval": 4,
                "val_before_train": False,
            },
            "checkpoint": {
                "save_dir": str(folder),
                "async_save": is_async,
                "keep_last": 2,
                "keep_best": 1,
                "keep_every": 8,
            },
            "launch": {"device": "cpu"},
        }
        self._config.write_text(yaml.safe_dump(config))
        self.tally = Tally()
        # The step that the next attempt must continue from.
        self._expected: int | None = None
        ranks = self._start("undisturbed")
        assert ranks.wait() == [0], self._log("undisturbed").read_text()
        run, recorded = self._read("undisturbed")
        self._steps = {s.step: _exact(s) for s in recorded if isinstance(s, e.StepCompleted)}
        self._final = _contents(run)
        saves = sorted(p.seconds for p in recorded if isinstance(p, e.CheckpointPublished))
        self._save_seconds = saves[len(saves) // 2]

    def run(self, kills: int) -> Tally:
        """Kill that number of times, then let the last run end."""
        number = 0
        while self.tally.kills < kills or number:
            name = f"run-{self.tally.runs:03d}"
            number += 1
            self._check_start(name, self._attempt(name, is_killed=self.tally.kills < kills))
            run, _ = self._read(name)
            self._check(name, run)
            if run.status == "succeeded":
                if _contents(run) != self._final:
                    self._blame(
                        name, "ended with other bytes in its last checkpoint than the undisturbed run"
                    )
                self.tally.runs += 1
                number = 0
            elif number > 10 * STEPS:
                self._blame(name, "does not come to its end")
                break
        return self.tally

    def _start(self, name: str) -> Ranks:
        return self._warm.direct([str(self._config), f"trainer.experiment_name={name}"], self._log(name))

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _attempt(self, name: str, *, is_killed: bool) -> list[e.Event]:
        """One attempt, killed or not. Returns its events."""
        run = DirectRun(self._folder / name)
        attempt = run.attempt(run.attempts() + 1)
        aim = self._random.choices([*AIMS], [share for _, share in AIMS.values()])[0]
        countdown = self._random.randint(1, 3)
        delay = self._random.random() * (_SAVES * self._save_seconds if aim == "a save" else _SECONDS)
        kind = AIMS[aim][0]
        ranks = self._start(name)
        events: list[e.Event] = []
        offset = 0

        def is_due() -> bool:
            nonlocal countdown, offset
            lines, offset = journal.read(attempt.journal, offset)
            events.extend(line.event for line in lines)
            countdown = max(0, countdown - sum(isinstance(line.event, kind) for line in lines))
            return not countdown or attempt.exit_file.exists() or has_ended(ranks.pids[0])

        if is_killed:
            until(is_due, every=0.0005)
            if not countdown:
                # The moment of the kill itself: nothing is waited for but an end before that.
                holds_within(delay, lambda: has_ended(ranks.pids[0]))
                ranks.kill()
        code = ranks.wait()[0]
        events += [line.event for line in journal.read(attempt.journal, offset)[0]]
        if code == -9:
            self.tally.kills += 1
            self.tally.aims[aim] += 1
            self.tally.found[self._what_is_left(run)] += 1
        elif code != 0:
            self._blame(name, f"ended with {code}: {self._log(name).read_text()[-2000:]}")
        return events

    def _check_start(self, name: str, events: list[e.Event]) -> None:
        for step in (s for s in events if isinstance(s, e.StepCompleted)):
            self.tally.steps += 1
            if _exact(step) != self._steps[step.step]:
                self._blame(name, f"step {step.step}: {_exact(step)}, undisturbed {self._steps[step.step]}")
        resumed = [s.step for s in events if isinstance(s, e.TrainingResumed)]
        if resumed and resumed[0] != self._expected:
            self._blame(name, f"continued from step {resumed[0]}, not {self._expected}")
        self.tally.wrong += [f"{name}: {s.reason}" for s in events if isinstance(s, e.CheckpointRejected)]

    def _check(self, name: str, run: Run) -> None:
        folder = DirectRun(self._folder / name).checkpoint_dir
        whole: dict[Path, str] = {}
        for path in sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)):
            try:
                manifest = manifests.read(path, None)
                damage = manifests.find_damage(path, manifest)
            except CheckpointInvalid as error:
                damage = str(error)
            self.tally.verified += 1
            if damage:
                self._blame(name, f"{path.name} does not verify: {damage}")
            else:
                whole[path] = manifests.digest((path / manifests.NAME).read_bytes())
        reasons = why_kept(run)
        for c in run.checkpoints:
            if reasons[c.step] and whole.get(Path(c.path)) != c.manifest_digest:
                self._blame(name, f"step {c.step} is kept ({', '.join(reasons[c.step])}), but not there")
        start = run.restart_checkpoint
        self._expected = start.step if start else None

    def _what_is_left(self, run: DirectRun) -> Found:
        state, _ = self._read(run.path.name)
        recorded = {Path(c.path).name for c in state.checkpoints}
        names = {p.name for p in run.checkpoint_dir.glob("step-*")}
        if any(name.endswith(".deleted") for name in names):
            return "a half-deleted one"
        if partial := [name for name in names if name.endswith(".partial")]:
            is_whole = (run.checkpoint_dir / partial[0] / manifests.NAME).exists()
            return "all but its name" if is_whole else "a part"
        deleted = {Path(p).name for p in _deleted(run)}
        return "a checkpoint without an event" if names - recorded - deleted else "nothing"

    def _read(self, name: str) -> tuple[Run, list[e.Event]]:
        run = DirectRun(self._folder / name)
        submission = run.submission()
        assert submission is not None
        history = read_history(run, submission)
        return history.run, [n.event for n in history.events]

    def _blame(self, name: str, what: str) -> None:
        self.tally.wrong.append(f"{name}, kill {self.tally.kills}: {what}")


def _deleted(run: DirectRun) -> list[str]:
    submission = run.submission()
    assert submission is not None
    return [
        n.event.path for n in read_history(run, submission).events if isinstance(n.event, e.CheckpointDeleted)
    ]


def _exact(s: e.StepCompleted) -> tuple[Any, ...]:
    return s.loss.hex(), s.grad_norm.hex(), s.lr, s.tokens_total, s.samples_digest


def _contents(run: Run) -> dict[str, str]:
    """sha256 of every file of the last checkpoint: weights, optimizer, random streams. `.metadata` names its own folder."""
    files = manifests.read(Path(run.checkpoints[-1].path), None).files
    return {f.name: f.sha256 for f in files if f.name != ".metadata"}
