"""Folders with characters that mean something in a URL, a shell, a pattern or a config: every command works there."""

from __future__ import annotations

import json
from pathlib import Path

from tests.builders.process.homes import Home

ODD = "h %41?x=1#y 'q\" [a]{b} $HOME ü;&"


def test_every_command_works_in_a_folder_with_an_odd_name(
    tmp_path: Path, tiny_model: Path, warm_python: str
) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    model = folder / "model %3F"
    model.symlink_to(tiny_model)
    home = Home(folder, model, warm_python)
    home.env["SFTD_HOME"] = str(folder / "home")
    del home.env["MLFLOW_TRACKING_URI"]
    # It exists, so its name is not looked through for variables.
    (folder / "saved #1?").mkdir()
    checkpoints = f"checkpoint.save_dir={json.dumps(str(folder / 'saved #1?'), ensure_ascii=False)}"
    run = home.submit("trainer.max_steps=4", "trainer.save_interval=2", checkpoints)
    home.drain()
    fork = home.run("fork", run, "--from-step", "2", "optimizer.lr=2e-3", "-q").stdout.strip()
    home.drain()
    for command in (
        ["ls"],
        ["show", run],
        ["events", run],
        ["queue"],
        ["nodes"],
        ["logs", run],
        ["checkpoints", run],
        ["lineage", run],
        ["compare", run, fork],
        ["compare", run, fork, "--html", "page #1?.html"],
        ["replay", run],
        ["data", run, "--step", "1"],
        ["verify", run],
        ["gc", "--dry-run"],
        ["plan", str(home.config)],
        ["watch", "--once"],
        ["db", "check"],
        ["views", "rebuild"],
        ["export", run, "exported #1?"],
        ["resume", run, "--from-step", "2"],
    ):
        home.run(*command)
    home.drain()
    home.run("mlflow", "rebuild")
    home.run("mlflow", "check")
    assert json.loads(home.run("show", run, "--json").stdout)["status"] == "succeeded"
    found = json.loads(home.run("doctor", "--json", check=None).stdout)
    assert {f["check"] for f in found if f["state"] == "broken"} <= {"devices", "torch", "NCCL"}
    # No file lies beside the folder, under half of its name (MLflow makes an empty folder there: it takes the quoted
    # path in a database's URL for a path).
    assert [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents] == []
    assert (folder / "home/sftd.db").is_file()
    assert (folder / "home/mlflow.db").is_file()
    assert (folder / "exported #1?/config.json").is_file()
    assert (folder / "saved #1?").is_dir()
