"""`sftd plan` and the X-ray of `sftd submit`, as a user sees them. (test_end_to_end.py compares a plan with its run.)"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from sftd.cli import main
from tests.builders import json_fields
from tests.builders.process.homes import Home
from tests.builders.process.tiny_llama import VOCABULARY, write_rows, write_tiny_model

Sftd = Callable[..., Result]


@pytest.fixture
def sftd(home: Home) -> Sftd:
    """A command in this process: for the terminal's sake."""

    def run(*arguments: str, columns: int = 120) -> Result:
        return CliRunner().invoke(main, arguments, env=home.env | {"COLUMNS": str(columns)})

    return run


def with_tokenizer(home: Home, path: Path) -> Path:
    """The tiny model with a tokenizer that calls token 7 `t7`, and says that answers end with token 5."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = write_tiny_model(path / "with-words")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = yaml.safe_load(home.config.read_text())
    settings["model"]["partial_pretrain"] = str(folder)
    home.config.write_text(yaml.safe_dump(settings))
    return folder


def data(home: Home, ids: list[list[int]], labels: list[list[int]]) -> None:
    import pyarrow as pa

    masks = [[1] * len(row) for row in ids]
    columns = {"input_ids": pa.array(ids), "labels": pa.array(labels), "attention_mask": pa.array(masks)}
    write_rows(home.path / "train.parquet", len(ids), **columns)


def test_a_plan_says_memory_time_disk_and_the_layout(home: Home, sftd: Sftd) -> None:
    done = sftd("plan", str(home.config))
    assert done.exit_code == 0, done.output
    for word in ("weights", "optimizer", "activations", "at the peak", "fits", "step", "run", "disk"):
        assert word in done.output
    assert ", 1 rank, float32" in done.output
    assert not (home.path / "home" / "sftd.db").exists(), "a plan writes nothing"


def test_a_plan_for_another_machine(home: Home, sftd: Sftd) -> None:
    for_eight = ("--devices", "8", "--memory", "80", "--device", "H100", "--json")
    done = sftd("plan", str(home.config), *for_eight)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    json_fields.check("plan", plan)
    json_fields.check("plan best", plan["best"])
    json_fields.check("plan memory", plan["memory"][0])
    for part in ("machine", "work", "pace", "storage"):
        json_fields.check(f"plan {part}", plan[part])
    assert (plan["machine"]["device"], plan["dtype"], plan["fits"]) == ("cuda", "bfloat16", True)
    assert plan["peak_memory_bytes"] == plan["memory"][0]["total"]
    assert plan["memory_bytes"] == 80 * 2**30
    assert plan["best"]["peak_memory_bytes"] > 0
    assert plan["layouts_fit"] > 1
    assert plan["alternatives"] == {}


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        (("--device", "H100", "--devices", "1"), 1),
        # Ranks on a CPU share the memory of its host.
        (("launch.device=cpu", "launch.nproc_per_node=2", "training.micro_batch_size_per_gpu=2"), 2),
    ],
)
def test_what_is_needed_fits_and_a_byte_less_does_not(
    home: Home, sftd: Sftd, given: tuple[str, ...], ranks: int
) -> None:
    def plan(memory: float) -> dict[str, Any]:
        done = sftd("plan", str(home.config), *given, "--memory", repr(memory / 2**30), "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    needed = ranks * plan(2**36)["device_bytes_needed"]
    enough, less = plan(needed), plan(needed - 1)
    assert (enough["ranks"], enough["memory_bytes"], less["memory_bytes"]) == (ranks, needed, needed - 1)
    assert (enough["fits"], less["fits"]) == (True, False)


def test_what_does_not_fit_is_said(home: Home, sftd: Sftd) -> None:
    done = sftd("plan", str(home.config), "--device", "H100", "--memory", "0.5", columns=80)
    assert done.exit_code == 0, done.output
    assert "does not fit" in done.output
    assert "No layout fits" in done.output
    assert "The smallest needs" in done.output
    assert "These need less" in done.output
    assert "LoRA: model.lora.rank=16" in done.output
    done = sftd("plan", str(home.config), "--device", "H100", "--memory", "0.5", "--json")
    instead = json.loads(done.stdout)["alternatives"]["LoRA"]
    json_fields.check("plan alternatives", instead)
    assert (instead["set"]["model.lora.rank"], instead["fits"]) == (16, False)
    unknown = sftd("plan", str(home.config), "--device", "Voodoo2")
    assert unknown.exit_code == 2
    assert "--memory" in unknown.output


def test_a_plan_refuses_what_submit_refuses(home: Home, sftd: Sftd) -> None:
    done = sftd("plan", str(home.config), "data.train_files=[nowhere.parquet]")
    assert done.exit_code == 2
    assert "no such file" in done.output


def test_the_xray_marks_what_is_trained(home: Home, sftd: Sftd, tmp_path: Path) -> None:
    with_tokenizer(home, tmp_path)
    data(home, [[9, 10, 11, 12, 5], [20, 21, 22]], [[-100, -100, 11, 12, 5], [20, -100, -100]])
    done = sftd("submit", str(home.config), "--xray", "trainer.max_steps=1")
    assert done.exit_code == 0, done.output
    # A label at a row's first place trains nothing.
    assert "t9 t10«t11 t12 t5»" in done.output
    assert "row 1: 3 tokens, 0 trained" in done.output
    assert "60.0% are trained" in done.output
    assert "1 dropped" in done.output
    assert "1 of 1 rows train the token that ends an answer" in done.output
    assert "1 of 2 rows have no trained label and are dropped (rows 1, from 0)" in done.output
    assert "on the CPU: `sftd plan`" in done.output


def test_the_xray_lets_data_do_nothing_to_a_terminal(home: Home, sftd: Sftd, tmp_path: Path) -> None:
    file = with_tokenizer(home, tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text().replace('"t10"', '"\\u001b[2J\\u202e"'))))
    data(home, [[9, 10, 11, 12, 5]], [[-100, -100, 11, 12, 5]])
    done = sftd("submit", str(home.config), "--xray", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "t9  [2J " in done.stderr
    assert not {"\x1b", "\u202e"} & set(done.output)


def test_the_xrays_padding_is_that_of_the_device(home: Home, sftd: Sftd) -> None:
    data(home, [[9, 10, 11]], [[-100, 10, 11]])
    on_gpus = sftd("submit", str(home.config), "--xray", "--dry-run", "launch.device=cuda")
    assert on_gpus.exit_code == 0, on_gpus.output
    # A GPU's lengths are multiples of 64.
    assert f"padding is {1 - 3 / 64:.1%} of what is computed" in on_gpus.output


def test_without_a_tokenizer_the_xray_shows_ids(home: Home, sftd: Sftd) -> None:
    data(home, [[9, 10, 11]], [[-100, 10, 11]])
    done = sftd("submit", str(home.config), "--xray", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "9«10 11»" in done.output
    assert "tokenizer.json cannot be read" in done.output


@pytest.mark.parametrize("option", [("-q",), ("--json",), ()], ids=["-q", "--json", "not a terminal"])
def test_scripts_see_no_xray(home: Home, sftd: Sftd, option: tuple[str, ...]) -> None:
    done = sftd("submit", str(home.config), *option)
    assert done.exit_code == 0, done.output
    assert "«" not in done.output


def test_an_untrained_stop_token_is_warned_of(home: Home, sftd: Sftd, tmp_path: Path) -> None:
    with_tokenizer(home, tmp_path)
    data(home, [[9, 10, 5]] * 4, [[-100, 10, -100]] * 4)
    done = sftd("submit", str(home.config), "--json")
    json_fields.check("submit", json.loads(done.stdout))
    (warning,) = [w for w in json.loads(done.stdout)["warnings"] if "ends an answer" in w]
    assert "the model will not learn to stop" in warning


def test_a_script_reads_the_id_alone_and_people_the_warnings(home: Home, sftd: Sftd) -> None:
    doubtful = (str(home.config), "optimizer.lr=0.5")
    queued = sftd("submit", *doubtful, "-q")
    assert re.fullmatch(r"[a-z]+-[a-z]+-[0-9a-f]{4}\n", queued.stdout)
    dry = sftd("submit", *doubtful, "--dry-run")
    assert json.loads(dry.stdout)["optimizer"]["lr"] == 0.5
    planned = sftd("plan", *doubtful, "--device", "H100", "--devices", "1")
    for done in (queued, dry, planned):
        assert done.exit_code == 0
        assert "optimizer.lr: 0.5 is far above" in done.stderr
        assert "far above" not in done.stdout
