"""A run continues longer and in another layout, and others fork from it: one story under a real daemon, seen from all sides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sftd.wire.checkpoint.directory import reading
from tests.builders import json_fields
from tests.builders.process.homes import Home
from tests.builders.process.timelines import timeline

LONGER = ("trainer.max_steps=9", "launch.nproc_per_node=2", "checkpoint.keep_last=1")


@dataclass
class Story:
    """What happened: `parent` trained 6 steps, `child` was forked from step 4 and `broken` from step 2, whose checkpoint is
    damaged; then `parent` went on to step 9 in another layout. `said` holds what commands printed meanwhile."""

    home: Home
    parent: str
    child: str
    broken: str
    said: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.home.attempt(self.parent).path.parent / "checkpoints"

    def checkpoints(self, run_id: str) -> dict[int, dict[str, Any]]:
        """Step → what `sftd checkpoints` says of it."""
        listed = json.loads(self.home.run("checkpoints", run_id, "--json").stdout)
        return {row["step"]: row for row in listed}


def curve(home: Home, run_id: str) -> list[tuple[int, float]]:
    """The loss by step as MLflow has it."""
    engine = sa.create_engine(home.env["MLFLOW_TRACKING_URI"], poolclass=sa.NullPool)
    query = sa.text(
        "SELECT m.step, m.value FROM metrics m JOIN tags t ON t.run_uuid = m.run_uuid "
        "WHERE m.key = 'loss' AND t.key = 'sftd.run' AND t.value = :run ORDER BY m.step"
    )
    with engine.connect() as connection:
        return [(row.step, row.value) for row in connection.execute(query, {"run": run_id})]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, warm_python: str) -> Story:
    home = Home(tmp_path_factory.mktemp("story"), tiny_model, warm_python)
    home.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{home.path}/mlflow.db"
    constant = ("scheduler.type=constant", "trainer.max_steps=6", "trainer.save_interval=1")
    parent = home.submit(*constant, "checkpoint.keep_last=9")
    home.drain()
    told = Story(home, parent, "", "", {})

    def refused(name: str, *arguments: str) -> None:
        told.said[name] = home.run(*arguments, check=2).stderr

    refused("other lr", "resume", parent, "optimizer.lr=5e-4", "trainer.max_steps=8")
    refused("no step left", "resume", parent, "checkpoint.keep_last=1")
    refused("no such step", "fork", parent, "--from-step", "7")
    refused("no step to do", "fork", parent, "optimizer.lr=5e-4")
    refused("other model", "fork", parent, "trainer.max_steps=8", "model.override_config={hidden_act: gelu}")
    refused("other dtype", "fork", parent, "trainer.max_steps=8", "model.megatron.params_dtype=bfloat16")
    change = ("--from-step", "4", "optimizer.lr=5e-4", "trainer.max_steps=8")
    refused("dry run with no step to do", "fork", parent, "optimizer.lr=5e-4", "--dry-run")
    told.said["dry run"] = home.run("fork", parent, *change, "--dry-run").stdout
    told.child = home.run("fork", parent, *change, "-q").stdout.strip()
    broken = json.loads(home.run("fork", parent, "--from-step", "2", "--json").stdout)
    json_fields.check("fork", broken)
    told.broken = broken["run_id"]
    refused("pinned", "resume", parent, "--from-step", "1")
    damaged = max((told.folder / "step-00000002").glob("*.distcp"), key=lambda f: f.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (told.folder / "step-00000000.deleted").mkdir()
    told.said["resumed"] = home.run("resume", parent, *LONGER).stdout
    with reading(told.folder / "step-00000001"):
        home.drain()
        told.said["gc while read"] = home.run("gc").stdout
    told.said["curve"] = json.dumps(curve(home, told.child))
    told.said["lineage"] = home.run("lineage", told.child).stdout
    return told


def test_what_makes_other_steps_is_refused_with_the_fork_that_does_it(story: Story) -> None:
    said = story.said["other lr"]
    assert f"optimizer.lr: is 0.0005, but {story.parent} has 0.001" in said
    assert "trainer.max_steps" not in said.split("fix:")[0]
    assert (
        f"fix: fork the run instead: sftd fork {story.parent} optimizer.lr=5e-4 trainer.max_steps=8" in said
    )
    assert "train more with trainer.max_steps=N" in story.said["no step left"]
    assert f"the checkpoint of step 7 of {story.parent} is missing" in story.said["no such step"]
    assert "use one of 0, 1, 2, 3, 4, 5, 6" in story.said["no such step"]
    assert "steps count from the parent's first: trainer.max_steps=12" in story.said["no step to do"]
    assert story.said["dry run with no step to do"] == story.said["no step to do"]
    assert "gelu" in story.said["other model"]
    assert "was trained in float32" in story.said["other dtype"]
    assert f"would overwrite step 2, the fork point of {story.broken}" in story.said["pinned"]
    assert f"fix: sftd fork {story.parent} --from-step 1" in story.said["pinned"]


def test_a_run_goes_on_longer_and_in_another_layout(story: Story) -> None:
    assert "from step 6 to step 9" in story.said["resumed"]
    shown = story.home.show(story.parent)
    assert (shown["status"], shown["step"], shown["planned_steps"], shown["attempt"]) == (
        "succeeded",
        9,
        9,
        2,
    )
    assert (shown["anomalies"], shown["steps_redone"]) == (0, 0)
    asked = story.home.events(story.parent, "ResumeRequested")[0]
    assert asked["payload"]["changes"]["trainer.max_steps"] == [6, 9]
    assert asked["payload"]["changes"]["launch.nproc_per_node"] == [1, 2]
    assert "launch.nproc_per_node: 1 → 2" in story.home.run("show", story.parent).stdout
    assert "trainer.max_steps: 6 → 9" in story.home.run("events", story.parent).stdout
    assert story.home.attempt(story.parent, 2).order().spec.world_size == 2


def test_a_fork_goes_on_where_its_parent_stood(story: Story) -> None:
    shown = story.home.show(story.child)
    assert (shown["status"], shown["step"], shown["planned_steps"]) == ("succeeded", 8, 8)
    # Four steps of four samples.
    assert {n: shown["fork"][n] for n in ("parent", "step", "sample")} == {
        "parent": story.parent,
        "step": 4,
        "sample": 16,
    }
    mine, parents = timeline(story.home, story.child), timeline(story.home, story.parent)
    assert list(mine) == [5, 6, 7, 8]
    loss, _, lr, tokens, total, samples = mine[5]
    assert (loss, tokens, total, samples) == tuple(parents[5][i] for i in (0, 3, 4, 5))
    assert (lr, parents[5][2]) == (5e-4, 1e-3)
    assert mine[6][0] != parents[6][0]
    assert mine[8][5] == parents[8][5], "the same samples, further on as well"
    validated = [e["payload"]["step"] for e in story.home.events(story.child, "ValidationCompleted")]
    assert validated == [4, 8]
    whole = {step: parents[step][0] for step in range(1, 5)} | {step: mine[step][0] for step in mine}
    assert [tuple(point) for point in json.loads(story.said["curve"])] == sorted(whole.items())
    assert json.loads(story.said["dry run"])["optimizer"]["lr"] == 5e-4
    assert f"from step 4 of {story.parent}" in story.home.run("show", story.child).stdout


def test_a_fork_whose_checkpoint_is_damaged_fails_and_never_begins_anew(story: Story) -> None:
    shown = story.home.show(story.broken)
    assert (shown["status"], shown["attempt"], shown["cause"]) == ("failed", 1, "bad checkpoint")
    assert f"step 2 of {story.parent}, cannot be used" in shown["message"]
    assert story.home.events(story.broken, "StepCompleted") == []
    for more in ([], ["--from-step", "0"]):
        assert "cannot be used" in story.home.run("resume", story.broken, *more, check=2).stderr


def test_what_forks_and_readers_need_is_not_collected(story: Story) -> None:
    assert not (story.folder / "step-00000000.deleted").exists(), "what a crash left is swept"
    there = {int(p.name.removeprefix("step-")) for p in story.folder.iterdir()}
    kept = {2, 4, 6, 9}
    assert there == kept | {1}
    assert "left: it is being read" in story.said["gc while read"]
    assert "Nothing to delete." in story.said["gc while read"]
    assert f"{story.parent}  step 1 " in story.home.run("gc", "--dry-run").stdout
    assert (story.folder / "step-00000001").exists()
    deleted = json.loads(story.home.run("gc", story.parent, "--json").stdout)
    assert [(left["step"], left["is_gone"]) for left in deleted] == [(1, True)]
    assert story.home.run("gc").stdout == "Nothing to delete.\n"
    assert {int(p.name.removeprefix("step-")) for p in story.folder.iterdir()} == kept
    assert story.home.events(story.parent, "CheckpointDeleted")[-1]["actor"].startswith("cli:")

    rows = story.checkpoints(story.parent)
    assert {step: row["status"] for step, row in rows.items()} == (
        {1: "deleted", 2: "pinned", 3: "deleted", 4: "pinned", 5: "deleted"}
        | {6: "published", 7: "deleted", 8: "deleted", 9: "published"}
    )
    assert rows[4]["kept_because"] == [f"fork {story.child} starts from it"]
    assert (rows[6]["layout"]["dp"], rows[9]["layout"]["dp"]) == (1, 2)
    assert story.checkpoints(story.child)[4]["kept_because"][-1].startswith("the parent's")
    text = story.home.run("checkpoints", story.parent).stdout
    assert "DP2" in text
    assert f"in {story.folder}" in text


def test_the_tree_of_forks(story: Story) -> None:
    tree = json.loads(story.home.run("lineage", story.broken, "--json").stdout)
    assert (tree["run_id"], tree["forked_at"], tree["asked"], tree["step"]) == (story.parent, None, False, 9)
    assert [(f["run_id"], f["forked_at"], f["status"], f["asked"]) for f in tree["forks"]] == [
        (story.broken, 2, "failed", True),
        (story.child, 4, "succeeded", False),
    ]
    assert tree["forks"][1]["changes"]["optimizer.lr"] == [0.001, 0.0005]
    lines = story.said["lineage"].splitlines()
    assert lines[0].startswith(f"{story.parent}  succeeded  9/9  loss ")
    assert f"└─ {story.child} ◀  succeeded  8/8" in story.said["lineage"]
    assert "optimizer.lr: 0.001 → 0.0005" in story.said["lineage"]
