"""Training without a daemon: refused in words, reported step by step, resumed bit for bit, and imported afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import CheckpointDeleted, CheckpointPublished
from sftd.trainer.direct import plan as direct_plan
from sftd.wire.attempt.direct_run import DirectRun
from tests.builders import json_fields
from tests.builders.patience import PATIENCE
from tests.builders.trainer.direct_runs import Direct, events, exact, sftd, show
from tests.builders.trainer.tiny_models import write_rows

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Trainer

pytestmark = pytest.mark.usefixtures("forked")

LONG = {"max_steps": 30, "save_interval": 5, "val_before_train": False}


def test_killed_in_the_middle_the_same_command_goes_on_bit_for_bit(
    tmp_path: Path, models: Path, data: Path, trainer: Trainer
) -> None:
    """Two data-parallel ranks. The crashed folder becomes one timeline in the event store."""
    undisturbed = trainer.run(
        "direct_undisturbed",
        2,
        data__val_files=[],
        scheduler__type="constant",
        **{f"trainer__{k}": v for k, v in LONG.items()},
    )
    direct = Direct(tmp_path, models / "llama_tied", data, experiment_name="first", **LONG)
    constant = "scheduler.type=constant"
    run = direct.run("first")
    direct.holds.at(run.attempt(1).path, 14)
    process = direct.start(2, constant, cold=True)
    direct.held("first", process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(ranks, timeout=PATIENCE)[1], "ranks outlived torchrun"

    home = tmp_path / "home"
    crashed = sftd(home, "import", str(run.path), "-q").stdout.strip()
    assert (show(home, crashed)["status"], show(home, crashed)["cause"]) == ("failed", "lost")

    out, _ = direct.train(2, constant)
    saved = max(e.step for e in events(run) if isinstance(e, CheckpointPublished))
    assert f"Attempt 2 continues from step {saved}: 2 ranks (DP2), 30 steps" in out
    assert "step 30/30  loss " in out
    assert "ANOMALY" not in out
    whole = exact(undisturbed.all_events())
    first, second = exact(events(run, 1)), exact(events(run, 2))
    assert max(first) > saved
    assert first == {step: whole[step] for step in range(1, max(first) + 1)}
    assert second == {step: whole[step] for step in range(saved + 1, 31)}

    # The direct run bounds its checkpoints as a daemon does: the last two stay, and the one that was resumed from.
    kept = {saved, 25, 30}
    assert {p.name for p in run.checkpoint_dir.iterdir()} == {f"step-{step:08d}" for step in kept}
    deleted = [e.step for n in (1, 2) for e in events(run, n) if isinstance(e, CheckpointDeleted)]
    assert sorted(deleted) == [step for step in range(5, 31, 5) if step not in kept]

    assert sftd(home, "import", str(run.path), "-q").stdout.strip() == crashed
    shown = show(home, crashed)
    assert (shown["status"], shown["attempt"], shown["step"], shown["anomalies"]) == ("succeeded", 2, 30, 0)
    assert shown["steps_redone"] == max(first) - saved
    assert shown["tokens_counted"] == undisturbed.steps()[30].tokens_total
    again = json.loads(sftd(home, "import", str(run.path), "--json").stdout)
    json_fields.check("import", again)
    assert (again["run_id"], again["new_events"]) == (crashed, 0)

    out, _ = direct.train(2, constant)
    assert "All of its 30 steps are done" in out
    assert run.attempts() == 2

    # Longer, and in another layout: still the same run, and its history says what changed.
    out, _ = direct.train(2, constant, "trainer.max_steps=32", "model.megatron.tensor_model_parallel_size=2")
    assert "Attempt 3 continues from step 30: 2 ranks (TP2), 32 steps" in out
    assert sorted(exact(events(run, 3))) == [31, 32]
    sftd(home, "import", str(run.path))
    shown = show(home, crashed)
    assert (shown["status"], shown["attempt"], shown["step"], shown["anomalies"]) == ("succeeded", 3, 32, 0)
    said = sftd(home, "events", crashed, "-t", "ResumeRequested").stdout.splitlines()
    assert "→" not in said[0]
    assert "tensor_model_parallel_size: 1 → 2; trainer.max_steps: 30 → 32" in said[1], said


def test_a_refusal_is_told_once_and_leaves_nothing(tmp_path: Path, models: Path, data: Path) -> None:
    direct = Direct(tmp_path, models / "llama_tied", data)
    wrong = "model.megatron.tensor_model_parallel_size=4"
    out, err = direct.train(2, wrong, expect=1)
    assert err.count("refused: 1 problem; nothing was written") == 1
    assert err.count("2 ranks, but one copy of the model takes TP 4") == 1
    assert err.count("fix: use a multiple of 4 ranks, or smaller parallel sizes") == 1
    # What follows is torchrun's own report of a rank that ended with 2.
    assert "sftd/trainer" not in err
    assert "exitcode  : 2" in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_interrupted_alone_it_saves_and_goes_on(tmp_path: Path, models: Path, data: Path) -> None:
    """One rank without torchrun; the interval saves nothing before the interrupt."""
    direct = Direct(
        tmp_path,
        models / "llama_tied",
        data,
        experiment_name="alone",
        max_steps=30,
        save_interval=0,
    )
    run = direct.run("alone")
    direct.holds.at(run.attempt(1).path, 3)
    process = direct.start(None, cold=True)
    rank = direct.held("alone", process)
    sockets = psutil.Process(process.pid).net_connections(kind="inet")
    assert {s.laddr.ip for s in sockets if s.status == "LISTEN"} == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    rank.resume()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    last = max(exact(events(run)))
    assert last == 4
    assert f"step {last:>2}/30  checkpoint saved" in out
    assert f"Stopped at step {last} of 30; the same command again continues." in out
    home = tmp_path / "home"
    run_id = sftd(home, "import", str(run.path), "-q").stdout.strip()
    assert show(home, run_id)["status"] == "cancelled"
    out, _ = direct.train(None)
    assert f"Attempt 2 continues from step {last}: 1 rank, 30 steps" in out
    assert sorted(exact(events(run)) | exact(events(run, 2))) == list(range(1, 31))
    sftd(home, "import", str(run.path))
    assert show(home, run_id)["status"] == "succeeded"


@pytest.fixture
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the only rank."""
    for name in [n for n in os.environ if n.startswith(("SFTD_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


def plan(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, int, str]:
    """Attempt folder, exit code and what was said, of a command whose process then ends."""
    path, code, hold = direct_plan.plan([str(a) for a in arguments])
    if hold is not None:
        hold.close()
    said = capsys.readouterr()
    return path, code, said.out + said.err


@pytest.mark.usefixtures("rank_zero")
def test_another_spec_or_other_data_are_another_run(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(models / "llama_tied", tmp_path / "model")
    direct = Direct(tmp_path, tmp_path / "model", tmp_path / "data", experiment_name="named")
    first, code, said = plan(capsys, direct.config)
    assert (first, code) == (str(direct.run("named").attempt(1).path), 0)
    assert "Attempt 1 starts from the pretrained model: 1 rank, 6 steps" in said

    _, code, said = plan(capsys, direct.config, "optimizer.lr=5e-5", "data.train_batch_size=4")
    assert code == 2
    assert "refused: 2 problems; nothing was written" in said
    name = direct.run("named").submission().run_id
    assert f"optimizer.lr: is 5e-05, but {name} has 0.001 (in {direct.run('named').path})" in said
    assert "data.train_batch_size: is 4, but" in said
    assert "begin another: trainer.experiment_name=NAME" in said
    (tmp_path / "moved").mkdir()
    shutil.copytree(direct.run("named").path, tmp_path / "moved" / "named")
    _, code, said = plan(capsys, direct.config, f"checkpoint.save_dir={tmp_path / 'moved'}")
    assert code == 2
    assert f"was moved: its checkpoints were in {tmp_path / 'out'}" in said

    # It died before it saved anything.
    second, code, said = plan(capsys, direct.config)
    assert (second, code) == (str(direct.run("named").attempt(2).path), 0)
    assert "Attempt 2 continues from the pretrained model" in said

    config = tmp_path / "model" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.25}))
    _, code, said = plan(capsys, direct.config)
    assert code == 2
    assert f"{config} changed since the run was submitted: rms_norm_eps is 0.25, was " in said
    assert "begin another: trainer.experiment_name=NAME" in said
    config.write_text(before)

    write_rows(tmp_path / "data" / "train.parquet", 37, seed=99)
    _, code, said = plan(capsys, direct.config)
    assert code == 2
    assert f"data.train_files: the contents of the files changed since {name} began" in said
    assert direct.run("named").attempts() == 2

    other, code, _ = plan(capsys, direct.config, "trainer.experiment_name=other")
    assert (other, code) == (str(direct.run("other").attempt(1).path), 0)


@pytest.mark.usefixtures("rank_zero")
def test_a_run_that_lives_is_not_started_twice(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = Direct(tmp_path, models / "llama_tied", data, experiment_name="named")
    _, code, hold = direct_plan.plan([str(direct.config)])
    assert hold is not None
    _, code, said = plan(capsys, direct.config)
    assert code == 2
    assert f"is being trained or imported at this moment (attempt 1 has pid {os.getpid()} on" in said
    hold.close()
    assert plan(capsys, direct.config)[1] == 0


@pytest.mark.usefixtures("rank_zero")
def test_keys_alone_are_enough(
    tmp_path: Path,
    models: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The form `-m sftd.trainer model.partial_pretrain=…`, with neither a file, a name nor a folder to save in."""
    monkeypatch.chdir(tmp_path)
    keys = [f"model.partial_pretrain={models / 'llama'}", f"data.train_files={data / 'train.parquet'}"]
    path, code, _ = plan(capsys, *keys)
    again, _, said = plan(capsys, *keys)
    assert code == 0
    assert Path(path).parent.parent == tmp_path / "sftd-runs"
    assert Path(again).parent == Path(path).parent
    assert Path(path).parent.name.startswith("run-")
    assert "Attempt 2" in said
    order = DirectRun(Path(path).parent).attempt(1).order()
    assert (order.spec.world_size, order.spec.checkpoint.save_dir) == (1, str(tmp_path / "sftd-runs"))
    # Without a name, another spec is simply another run.
    other, _, _ = plan(capsys, *keys, "optimizer.lr=2e-5")
    assert Path(other).parent != Path(path).parent
    _, code, said = plan(capsys)
    assert code == 2
    assert "model.partial_pretrain: is not set" in said
    assert "data.train_files: is empty" in said


@pytest.mark.usefixtures("rank_zero")
def test_every_check_of_submit_is_made(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = Direct(tmp_path, models / "llama_tied", data)
    shifted = tmp_path / "shifted.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2, 3, 4]], "labels": [[2, 3, 4, -100]]}), shifted)
    for override, said in {
        "optimizer.lrr=1": "did you mean `optimizer.lr`?",
        "data.val_files=nothing.parquet": "nothing.parquet: no such file",
        f"data.val_files={shifted}": "the labels are shifted by one",
        "model.override_config={vocab_size: 9}": "outside the model's vocabulary of 9",
        "scheduler.warmup_steps=7": "is more than the 6 steps",
        "launch.device=cuda": "each rank needs its own GPU, but this host has 0",
        "model.megatron.sequence_parallel=true": "there is only one tensor-parallel rank",
    }.items():
        _, code, found = plan(capsys, direct.config, override)
        assert code == 2
        assert said in found
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("rank_zero")
def test_a_folder_that_cannot_be_used_is_a_sentence(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = Direct(tmp_path, models / "llama_tied", data, experiment_name="named")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "named").write_text("a file")
    _, code, said = plan(capsys, direct.config)
    assert code == 1
    assert said.startswith("sftd: ")
    assert str(tmp_path / "out" / "named") in said


@pytest.mark.usefixtures("rank_zero")
def test_it_goes_on_from_the_checkpoint_that_was_not_rejected(
    tmp_path: Path, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sftd.domain.log.events import CheckpointRejected
    from sftd.wire.attempt.journal import JournalWriter

    direct = Direct(tmp_path, models / "llama_tied", data, experiment_name="named")
    run = direct.run("named")
    plan(capsys, direct.config)
    writer = JournalWriter(run.attempt(1).journal)
    for step in (1, 2):
        folder = run.checkpoint_dir / f"step-{step:08d}"
        folder.mkdir(parents=True)
        writer.append(
            CheckpointPublished(step=step, path=str(folder), bytes=1, manifest_digest=f"m{step}", seconds=1.0)
        )
    writer.close()
    path, _, said = plan(capsys, direct.config)
    order = msgspec.json.decode((Path(path) / "order.json").read_bytes())
    assert (order["checkpoint"], order["checkpoint_digest"]) == (
        str(run.checkpoint_dir / "step-00000002"),
        "m2",
    )
    writer = JournalWriter(run.attempt(2).journal)
    writer.append(CheckpointRejected(step=2, path=order["checkpoint"], reason="bit rot"))
    writer.close()
    _, _, said = plan(capsys, direct.config)
    assert "Attempt 3 continues from step 1:" in said
