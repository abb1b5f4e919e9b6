"""The script that fine-tunes LLaMA-2-7B, on a tiny Llama and two CPU ranks; and `sftd generate` from what it saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sftd.domain.log.events import ModelLoaded, SampleGenerated, StepCompleted
from sftd.wire.attempt.direct_run import DirectRun
from tests.builders import json_fields
from tests.builders.patience import PATIENCE
from tests.builders.trainer.direct_runs import ROOT, environment, events, sftd
from tests.builders.warm_client import VARIABLE

# All processes but those of the first run are forks.
pytestmark = pytest.mark.usefixtures("forked")

SCRIPT = ROOT / "scripts" / "run_llama2_7b_megatron.sh"
PROMPTS = ["abc", "what is this?"]
# High enough that each checkpoint answers differently.
SMALL = (
    *("launch.device=cpu", "trainer.max_steps=6", "trainer.save_interval=3", "trainer.val_check_interval=3"),
    *("optimizer.lr=1e-2", "data.train_batch_size=8", "data.sequence_length=64", "checkpoint.keep_last=2"),
    *("training.micro_batch_size_per_gpu=2", f"trainer.sample_prompts={json.dumps(PROMPTS)}"),
    "trainer.sample_max_tokens=8",
)


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Where the checkout has no .venv, `python3` is this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=environment(PATH=path, **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to save in whose name YAML would misread."""
    return tmp_path_factory.mktemp("it's: [here]")


@pytest.fixture(scope="module")
def tp2(out: Path, models: Path, data: Path) -> DirectRun:
    """Without layout keys, two ranks are tensor-parallel."""
    files = {"MODEL": str(models / "llama"), "TRAIN_FILES": str(data / "train.parquet")}
    cold = {VARIABLE: ""}
    done = script("2", str(out), *SMALL, VAL_FILES=str(data / "val.parquet"), **files, **cold)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Attempt 1 starts from the pretrained model: 2 ranks (TP2), 6 steps" in done.stdout
    return DirectRun(out / "llama2-7b")


@pytest.fixture(scope="module")
def imported(tp2: DirectRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A home with that run in it, and the run's id."""
    home = tmp_path_factory.mktemp("home")
    return home, sftd(home, "import", str(tp2.path), "-q").stdout.strip()


def samples(run: DirectRun, step: int) -> list[tuple[str, str, int, bool]]:
    found = [e for e in events(run) if isinstance(e, SampleGenerated) and e.step == step]
    return [(e.prompt, e.text, e.tokens, e.stopped) for e in found]


def test_layout_keys_lay_it_out(tp2: DirectRun, out: Path, models: Path, data: Path) -> None:
    """PP2 × VPP2 by keys, model and data by keys too; the numbers are those of TP2 within rounding."""
    keys = (
        f"model.path={models / 'llama'}",
        f"data.train_files=[{data / 'train.parquet'}]",
        f"data.val_files=[{data / 'val.parquet'}]",
        "model.megatron.pipeline_model_parallel_size=2",
        "model.megatron.virtual_pipeline_model_parallel_size=2",
        "trainer.experiment_name=pipelined",
    )
    done = script("2", str(out), *SMALL, *keys)
    assert done.returncode == 0, done.stdout + done.stderr
    run = DirectRun(out / "pipelined")
    loaded = next(e for e in events(run) if isinstance(e, ModelLoaded))
    assert loaded.environment["layout"] == {"tp": 1, "pp": 2, "vpp": 2, "cp": 1, "ep": 1, "dp": 1}
    mine, theirs = ([e.loss for e in events(r) if isinstance(e, StepCompleted)] for r in (run, tp2))
    assert len(mine) == 6
    assert mine == pytest.approx(theirs, rel=1e-4)
    spec = run.attempt(1).order().spec
    assert tp2.attempt(1).order().spec.model.megatron.sequence_parallel
    assert spec.training.use_rmpad
    assert spec.model.enable_gradient_checkpointing


def test_another_config_trains_adapters(tmp_path: Path, models: Path, data: Path) -> None:
    given = {
        "MODEL": str(models / "llama"),
        "TRAIN_FILES": str(data / "train.parquet"),
        "CONFIG": str(ROOT / "scripts" / "run_llama3_8b_lora.yaml"),
    }
    keys = ("model.megatron.tensor_model_parallel_size=1", "trainer.sample_prompts=[]", "trainer.max_steps=1")
    done = script("2", str(tmp_path), *SMALL, *keys, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    run = DirectRun(tmp_path / "llama3-8b-lora")
    (loaded,) = (e for e in events(run) if isinstance(e, ModelLoaded))
    assert loaded.environment["layout"]["dp"] == 2
    assert loaded.trained_parameters is not None


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for arguments, variables, said in (
        ((), {}, "NPROC and SAVE_DIR are needed"),
        (("eight", "out"), {}, "'eight', which is not a number of ranks"),
        (("8", "optimizer.lr=1"), {}, "looks like a key"),
        (("8", "out"), {}, "no model: set MODEL, or give model.partial_pretrain=FOLDER"),
        (("8", "out"), {"MODEL": "m"}, "no data: set TRAIN_FILES, or give data.train_files=FILE"),
    ):
        done = script(*arguments, **variables)
        assert done.returncode == 2
        assert said in done.stderr
        assert "NPROC SAVE_DIR [key=value...]" in done.stderr
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint_answers_as_it_did_in_training(
    imported: tuple[Path, str], tp2: DirectRun, step: int
) -> None:
    """One rank, from a tensor-parallel checkpoint; 6 is the last, which is the default."""
    home, run_id = imported
    expected = samples(tp2, step)
    assert expected != samples(tp2, 3 if step == 6 else 6), "both checkpoints answer alike"
    arguments = ["--max-tokens", "8", "--device", "cpu", "--json", "--prompt", PROMPTS[0], "--prompt", "-"]
    arguments += ["--step", "3"] if step == 3 else []
    done = sftd(home, "generate", run_id, *arguments, stdin=f"{PROMPTS[1]}\n")
    answers = json.loads(done.stdout)
    json_fields.check("generate", answers[0])
    assert [(a["prompt"], a["text"], a["tokens"], a["stopped"]) for a in answers] == expected
    assert [a["step"] for a in answers] == [step, step]
    assert f"{run_id}, step {step}: loading" in done.stderr


def test_an_answer_alone_is_on_stdout(imported: tuple[Path, str], tp2: DirectRun) -> None:
    home, run_id = imported
    done = sftd(home, "generate", run_id, "-p", PROMPTS[0], "--max-tokens", "8", "--device", "cpu")
    assert done.stdout == samples(tp2, 6)[0][1] + "\n"


def test_a_damaged_checkpoint_answers_nothing(
    imported: tuple[Path, str], tp2: DirectRun, tmp_path: Path
) -> None:
    home, run_id = imported
    file = tp2.checkpoint_dir / "step-00000003" / ".metadata"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused = sftd(home, "generate", run_id, "-p", "abc", "--step", "3", "--device", "cpu", expect=2)
    finally:
        file.write_bytes(whole)
    assert ".metadata has sha256" in refused.stderr
    assert refused.stdout == ""


def test_checkpoints_that_are_not_there_are_refused(imported: tuple[Path, str], tp2: DirectRun) -> None:
    home, run_id = imported
    for command in (["generate", run_id, "-p", "abc"], ["export", run_id, "somewhere"]):
        refused = sftd(home, *command, "--step", "4", expect=2)
        assert "has no checkpoint of step 4" in refused.stderr
        assert "use --step with one of 3, 6" in refused.stderr
        folder = tp2.checkpoint_dir / "step-00000003"
        away = folder.rename(folder.with_name("away"))
        try:
            refused = sftd(home, *command, "--step", "3", expect=2)
        finally:
            away.rename(folder)
        assert "its checkpoint of step 3 is not on this host" in refused.stderr


def test_export_refuses_a_folder_with_something_in_it(imported: tuple[Path, str], tmp_path: Path) -> None:
    home, run_id = imported
    (tmp_path / "file").write_text("mine")
    refused = sftd(home, "export", run_id, str(tmp_path), expect=2)
    assert "exists already" in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_export_is_an_event(imported: tuple[Path, str], tmp_path: Path) -> None:
    home, run_id = imported
    folder = tmp_path / "model"
    said = json.loads(sftd(home, "export", run_id, str(folder), "--step", "3", "--json").stdout)
    json_fields.check("export", said)
    exported = sftd(home, "events", run_id, "--json", "-t", "ModelExported").stdout
    payload = json.loads(exported)["payload"]
    assert payload == {k: said[k] for k in ("step", "path", "bytes", "digest", "dtype")}
    assert (payload["step"], payload["path"], payload["dtype"]) == (3, str(folder), "float32")
    assert payload["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert "ModelExported" in sftd(home, "show", run_id).stdout
    assert (folder / "config.json").is_file()
    shutil.rmtree(folder)
