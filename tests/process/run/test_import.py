"""A run that was begun without a daemon, taken in, and finished by one: a run like any other."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from sftd.wire.attempt.direct_run import DirectRun
from tests.builders.holds import is_pending
from tests.builders.patience import PATIENCE, until
from tests.builders.process.homes import Home
from tests.builders.process.timelines import numbers

LONG = ("trainer.max_steps=120", "trainer.save_interval=20")


def train_until(home: Home, step: int, *overrides: str) -> DirectRun:
    """Train without a daemon, interrupted after `step`."""
    argv = [sys.executable, "-m", "sftd.trainer", str(home.config), *overrides]
    run = DirectRun(home.path / "out" / "direct")
    attempt = run.attempt(1)
    home.holds.at(attempt.path, step)
    with subprocess.Popen(argv, env=home.env, cwd=home.path, stdout=subprocess.DEVNULL) as process:
        rank = home.holds.wait(attempt.path, lambda: process.poll() is not None)
        process.send_signal(signal.SIGINT)
        # A warm start passes the signal on in its own time.
        until(lambda: is_pending(rank, signal.SIGINT), "the signal does not arrive")
        rank.resume()
        assert process.wait(timeout=PATIENCE) == 0
    return run


def test_a_daemon_finishes_what_was_begun_without_one(home: Home) -> None:
    home.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{home.path}/mlflow.db"
    folder = train_until(home, 30, *LONG, "checkpoint.save_dir=out", "trainer.experiment_name=direct")
    imported = home.run("import", str(folder.path), "-q").stdout.strip()
    shown = home.show(imported)
    assert shown["status"] == "cancelled"
    stopped_at = shown["step"]
    assert stopped_at == 31
    assert [c["step"] for c in shown["checkpoints"]] == [20, stopped_at]
    assert f"{stopped_at}/120" in home.run("ls").stdout
    assert not any((home.path / "home" / "runs").glob("*")), "nothing of it is copied"

    home.run("resume", imported)
    undisturbed = home.submit(*LONG)
    home.drain()
    shown = home.show(imported)
    assert (shown["status"], shown["attempt"], shown["anomalies"]) == ("succeeded", 2, 0)

    def timeline(run_id: str) -> dict[int, tuple[object, ...]]:
        return {e["payload"]["step"]: numbers(e) for e in home.events(run_id, "StepCompleted")}

    assert timeline(imported) == timeline(undisturbed)
    # The policy of the spec holds for the old folder as well: the last two, the best, and what was resumed from.
    kept = {Path(c["path"]) for c in shown["checkpoints"]}
    assert set(folder.checkpoint_dir.iterdir()) == {p for p in kept if p.parent == folder.checkpoint_dir}
    assert {p.name for p in folder.checkpoint_dir.iterdir()} == {f"step-{stopped_at:08d}"}
    assert home.run("import", str(folder.path)).stdout.startswith(f"{imported}: nothing new; succeeded")

    engine = sa.create_engine(home.env["MLFLOW_TRACKING_URI"], poolclass=sa.NullPool)
    with engine.connect() as connection:
        query = sa.text(
            "SELECT m.step, m.value FROM metrics m JOIN tags t ON t.run_uuid = m.run_uuid "
            "WHERE m.key = 'loss' AND t.key = 'sftd.run' AND t.value = :run ORDER BY m.step"
        )
        mirrored = {row.step: row.value for row in connection.execute(query, {"run": imported})}
    assert mirrored == {step: values[0] for step, values in timeline(imported).items()}
