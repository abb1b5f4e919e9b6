"""A run that crashes and a fork of it, while MLflow is away for the middle third and dies twice as it catches up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from tests.builders import json_fields
from tests.builders.claims import port_of_our_own
from tests.builders.holds import let_go
from tests.builders.patience import PATIENCE
from tests.builders.process.homes import Home, at_step
from tests.builders.process.mlflow_servers import MlflowServer, Way

# Four starts of MLflow, and three of torchrun.
pytestmark = pytest.mark.timeout(1800)

STEPS, FORK_STEP, FORK_STEPS = 240, 80, 200
Curve = list[tuple[int, int, float]]


@dataclass
class Story:
    home: Home
    server: MlflowServer
    parent: str
    fork: str
    lost_answers: int

    def curve(self, run_id: str, key: str) -> Curve:
        """(step, time in milliseconds, value) of every point that MLflow has, in the order of steps."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.server.url)
        found = client.get_experiment_by_name("sftd")
        [run] = client.search_runs([found.experiment_id], f"tags.`sftd.run` = '{run_id}'")
        history = client.get_metric_history(run.info.run_id, key)
        return sorted((m.step, m.timestamp, m.value) for m in history)

    def logged(self, run_id: str, field: str) -> Curve:
        """The same from the log's own table, by nothing of sftd's."""
        engine = sa.create_engine(f"sqlite:///{self.home.path}/home/sftd.db", poolclass=sa.NullPool)
        query = sa.text(
            "SELECT occurred_at, payload FROM events WHERE run_id = :run AND type = 'StepCompleted' ORDER BY version"
        )
        first: dict[int, tuple[int, int, float]] = {}
        with engine.connect() as connection:
            for occurred_at, payload in connection.execute(query, {"run": run_id}):
                step = json.loads(payload)
                first.setdefault(step["step"], (step["step"], occurred_at // 1000, float(step[field])))
        return sorted(first.values())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, warm_python: str) -> Iterator[Story]:
    home = Home(tmp_path_factory.mktemp("outage"), tiny_model, warm_python)
    server = MlflowServer(home.path)
    way = Way(server)
    # While it starts, so does torchrun.
    server.launch()
    home.env |= {"MLFLOW_TRACKING_URI": way.url, "SFTD_CPU_SLOTS": "2", "SFTD_SAMPLE_SECONDS": "0.5"}
    schedule = ("scheduler.type=constant", "trainer.save_interval=20", "checkpoint.keep_last=30")
    parent = home.submit(*schedule, f"trainer.max_steps={STEPS}")
    home.hold_at(parent, STEPS // 3)
    home.hold_at(parent, STEPS * 2 // 3, number=2)
    daemon = home.start_daemon()
    try:
        held = home.held(parent)
        server.wait()
        way.wait(lambda w: w.batches > 0)
        home.follow(parent, is_sampled)
        server.stop()
        home.hold_at(parent, STEPS // 2)
        let_go(held.values())
        home.held(parent)
        # The log is to know of the checkpoint before anybody forks from it.
        home.follow(parent, at_step(STEPS // 2))
        home.kill_ranks(parent)
        change = ("--from-step", str(FORK_STEP), "optimizer.lr=5e-3", f"trainer.max_steps={FORK_STEPS}")
        fork = home.run("fork", parent, *change, "-q").stdout.strip()
        held = home.held(parent, 2)
        home.wait(fork, "succeeded")
        daemon.kill()
        daemon.wait()
        first = home.events(parent, "SystemSampled")[0]["actor"]

        # MLflow is back, and dies in the moment in which it has taken a batch and not yet said so; then again.
        server.start()
        way.lose_next(lambda: server.stop(signal.SIGKILL))
        daemon = home.start_daemon()
        way.wait(lambda w: w.lost == 1)
        server.start()
        way.lose_next(lambda: server.stop(signal.SIGKILL))
        way.wait(lambda w: w.lost == 2)
        home.follow(parent, lambda e: is_sampled(e) and e["actor"] != first)
        server.start()
        # And so does the mirror, with the daemon.
        way.lose_next(daemon.kill)
        way.wait(lambda w: w.lost == 3)
        daemon.wait()
        let_go(held.values())
        home.drain()
        assert home.show(parent)["status"] == "succeeded"
        yield Story(home, server, parent, fork, way.lost)
    finally:
        daemon.kill()
        daemon.wait()
        home.close()
        way.close()
        server.stop(signal.SIGKILL)


def is_sampled(event: dict[str, Any]) -> bool:
    """Matches a look at the host."""
    return bool(event["type"] == "SystemSampled")


def test_the_history_is_that_of_the_log_point_for_point(story: Story) -> None:
    assert story.lost_answers == 3
    assert story.home.show(story.parent)["attempt"] == 2
    parent = {key: story.logged(story.parent, key) for key in ("loss", "grad_norm", "lr")}
    fork = {key: story.logged(story.fork, key) for key in parent}
    assert [p[0] for p in parent["loss"]] == list(range(1, STEPS + 1))
    assert [p[0] for p in fork["loss"]] == list(range(FORK_STEP + 1, FORK_STEPS + 1))
    for key, points in parent.items():
        assert story.curve(story.parent, key) == points
        assert story.curve(story.fork, key) == points[:FORK_STEP] + fork[key]


def test_the_check_of_sftd_says_so_too_and_finds_what_is_otherwise(story: Story) -> None:
    from mlflow.tracking import MlflowClient

    home = story.home
    lines = home.run("mlflow", "check", "--json").stdout.splitlines()
    checked: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert {c["run_id"] for c in checked if c["is_equal"]} == {story.parent, story.fork}
    assert checked[0]["points"] > 6 * STEPS

    said = home.run("mlflow", "rebuild", story.fork).stdout
    assert f"{story.fork}: {checked[1]['points']:,} points, equal to the log, in rebuilt/sftd" in said
    client = MlflowClient(story.server.url)
    found = client.get_experiment_by_name("rebuilt/sftd")
    [rebuilt] = client.search_runs([found.experiment_id])
    client.log_metric(rebuilt.info.run_id, "loss", 7.0, step=3)
    spoilt = home.run("mlflow", "check", story.fork, "--prefix", "rebuilt/", check=1)
    assert "loss: 1 point in MLflow not in the log, the first at step 3" in spoilt.stderr


def test_the_host_is_sampled_by_whichever_daemon_drives_the_run(story: Story) -> None:
    sampled = story.home.events(story.parent, "SystemSampled")
    assert {event["attempt"] for event in sampled} == {1, 2}
    assert len({event["actor"] for event in sampled}) > 1
    points = story.curve(story.parent, "system/system_memory_usage_megabytes")
    assert [(p[0], p[2]) for p in points] == [
        (n, event["payload"]["memory_used_bytes"] / 1e6) for n, event in enumerate(sampled)
    ]
    assert 0 <= sampled[-1]["payload"]["cpu_percent"] <= 100


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Every plot of the page: the title of its x axis, and name, x and y of each line.
PLOTS = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    title: plot.layout.xaxis.title.text || plot.layout.xaxis.title,
    lines: plot.data.map(line => ({name: line.name, x: Array.from(line.x || []), y: Array.from(line.y || [])})),
}))"""


@pytest.mark.skipif(CHROMIUM is None, reason="THE PAGE IS NOT TESTED: install Debian's chromium")
def test_in_a_browser_both_curves_are_whole_and_aligned_by_step(story: Story) -> None:
    from playwright.sync_api import sync_playwright

    home, port = story.home, port_of_our_own()
    env = home.env | {"MLFLOW_TRACKING_URI": f"sqlite:///{story.server.folder}/mlflow.db"}
    command = home.command("ui", story.parent, story.fork, "--port", str(port))
    served = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert served.stdout is not None
        said = next(line for line in served.stdout if line.startswith("MLflow on "))
        processes_of_it = psutil.Process(served.pid).children(recursive=True)
        assert len(processes_of_it) <= 4, "light: one worker and what starts it"
        listening = [
            c.laddr for p in processes_of_it for c in p.net_connections("tcp") if c.status == "LISTEN"
        ]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        with sync_playwright() as playwright:
            # In a container /dev/shm is often too small for it.
            arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=arguments, timeout=PATIENCE * 1000
            )
            page = browser.new_page(viewport={"width": 1200, "height": 660})
            page.set_default_timeout(PATIENCE * 1000)
            page.goto(said.split()[2])
            # Those of the gradient norm, the loss and the learning rate come first.
            page.wait_for_function(f"({PLOTS})().filter(plot => plot.lines.length >= 2).length >= 3")
            plots = page.evaluate(PLOTS)
            if picture := os.environ.get("SFTD_SCREENSHOT"):
                page.get_by_role("button", name="Close").first.click()
                page.wait_for_timeout(2000)
                page.screenshot(path=picture)
            browser.close()
    finally:
        served.terminate()
        assert served.wait(PATIENCE) == 0
        served.stdout.close()
    whole = {
        run_id: [(step, value) for step, _, value in story.curve(run_id, "loss")]
        for run_id in (story.parent, story.fork)
    }

    def drawn(plot: dict[str, Any], run_id: str) -> list[list[tuple[float, float]]]:
        """The lines of a run in a plot: its points, and the smoothed ones."""
        lines = [line for line in plot["lines"] if line["name"].split()[-1] == run_id]
        return [list(zip(line["x"], line["y"], strict=True)) for line in lines]

    [plot] = [p for p in plots if all(curve in drawn(p, run_id) for run_id, curve in whole.items())]
    assert plot["title"] == "Step"
    one, other = whole[story.parent], whole[story.fork]
    assert (one[-1][0], other[-1][0]) == (STEPS, FORK_STEPS)
    assert one[:FORK_STEP] == other[:FORK_STEP]
    assert one[FORK_STEP + 1] != other[FORK_STEP + 1], "there they part"


def test_a_model_is_registered_through_the_server(story: Story, tmp_path: Path) -> None:
    """Last: the log has more to say of the run from here on."""
    from mlflow.tracking import MlflowClient

    home, folder = story.home, tmp_path / "model"
    done = home.run("export", story.fork, str(folder), "--step", "100", "--register", "support", "--json")
    exported = json.loads(done.stdout)
    json_fields.check("export --register", exported)
    assert exported["registered"] == {"name": "support", "version": "1"}
    again = home.run("mlflow", "register", story.fork, "support").stdout
    assert again == f"registered {folder} as support version 1\n"

    client = MlflowClient(story.server.url)
    [version] = client.search_model_versions("name = 'support'")
    assert version.tags["sftd.export_digest"] == exported["digest"]
    assert client.get_run(version.run_id).data.tags["sftd.run"] == story.fork
    [there] = client.list_artifacts(version.run_id, "models")
    copy = Path(client.download_artifacts(version.run_id, there.path, str(tmp_path)))
    names = sorted(path.name for path in folder.iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    [recorded] = story.home.events(story.fork, "ModelRegistered")
    assert (recorded["payload"]["name"], recorded["payload"]["model_version"]) == ("support", "1")
