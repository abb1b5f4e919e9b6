"""Everything a user can get wrong is refused at submit: what, where, how to fix it; and nothing is written."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner

from sftd.cli import main
from tests.builders.process.homes import Home
from tests.builders.process.tiny_llama import SHAPE, VOCABULARY, write_rows

INT = pa.list_(pa.int32())
Prepare = Callable[[Home], None]


def config(text: str) -> Prepare:
    return lambda home: home.config.write_text(text) and None


def append(text: str) -> Prepare:
    return lambda home: home.config.write_text(home.config.read_text() + text) and None


def rows(**columns: object) -> Prepare:
    return lambda home: write_rows(home.path / "train.parquet", 3, **columns) and None


def shape(**changes: object) -> Prepare:
    """Replace the model by one whose config.json differs."""

    def prepare(home: Home) -> None:
        folder = home.path / "other-model"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in (SHAPE | changes).items() if v is not None})
        )
        (folder / "model.safetensors").write_bytes(b"")
        spec = yaml.safe_load(home.config.read_text())
        spec["model"]["partial_pretrain"] = str(folder)
        home.config.write_text(yaml.safe_dump(spec))

    return prepare


def nothing(home: Home) -> None:
    """The config as it is."""


def three(*values: list[int]) -> pa.Array:
    return pa.array(list(values), INT)


GOOD = [1, 2, 3]
M = "model.megatron."
# name: (what is done to the home, overrides, where the problem is, what is said, how to fix it)
TABLE: dict[str, tuple[Prepare, list[str], str, str, str]] = {
    "unknown key": (nothing, ["optimizer.lrr=1"], "optimizer.lrr", "unknown key", "optimizer.lr"),
    "unknown section": (nothing, ["optimiser.lr=1"], "optimiser.lr", "unknown key", "optimizer.lr"),
    "unknown key in the file": (
        append("sheduler: {type: linear}\n"),
        [],
        "sheduler.type",
        "unknown key",
        "scheduler.type",
    ),
    "section is a number": (nothing, ["optimizer=3"], "optimizer", "is a section", "optimizer.KEY"),
    "not key=value": (
        nothing,
        ["trainer.max_steps"],
        "trainer.max_steps",
        "not of the form",
        "optimizer.lr=1e-5",
    ),
    "wrong type": (nothing, ["trainer.max_steps=many"], "trainer.max_steps", "'many'", "a whole number"),
    "bool for a number": (nothing, ["optimizer.lr=true"], "optimizer.lr", "True", "a number"),
    "fraction for a count": (
        nothing,
        ["trainer.max_steps=1.5"],
        "trainer.max_steps",
        "1.5",
        "a whole number",
    ),
    "zero steps": (nothing, ["trainer.max_steps=0"], "trainer.max_steps", "0", "a whole number"),
    "negative learning rate": (nothing, ["optimizer.lr=-1e-5"], "optimizer.lr", "-1e-05", "a number"),
    "infinite learning rate": (
        nothing,
        ["optimizer.lr=.inf"],
        "optimizer.lr",
        "not a finite number",
        "finite",
    ),
    "beta of one": (nothing, ["optimizer.adam_beta1=1.0"], "optimizer.adam_beta1", "1.0", "a number"),
    "unknown schedule": (
        nothing,
        ["scheduler.type=cosin"],
        "scheduler.type",
        "cosin",
        "constant, cosine, linear",
    ),
    "betas of verl": (nothing, ["optim.betas=0.9"], "optim.betas", "cannot be used", "two numbers"),
    "resume mode of verl": (
        nothing,
        ["trainer.resume_mode=disable"],
        "trainer.resume_mode",
        "cannot be used",
        "sftd resume",
    ),
    "messages of verl": (
        nothing,
        ["data.messages_key=messages"],
        "data.messages_key",
        "cannot be used",
        "sftd prepare",
    ),
    "two names, two values": (
        append("optim: {lr: 3.0}\n"),
        [],
        "optim",
        "another name for",
        "keep one",
    ),
    "batch not divisible": (
        nothing,
        ["data.train_batch_size=5"],
        "data.train_batch_size",
        "5 is not a multiple",
        "use 4 or 6",
    ),
    "ranks not divisible": (
        nothing,
        [f"{M}tensor_model_parallel_size=2", "launch.nproc_per_node=3"],
        "launch.nproc_per_node",
        "3 ranks",
        "multiple of 2",
    ),
    "heads not divisible": (
        nothing,
        [f"{M}tensor_model_parallel_size=3", "data.train_batch_size=6"],
        f"{M}tensor_model_parallel_size",
        "4 attention heads",
        "1, 2",
    ),
    "layers not divisible": (
        nothing,
        [f"{M}pipeline_model_parallel_size=3"],
        f"{M}pipeline_model_parallel_size",
        "2 layers",
        "product divides the layers",
    ),
    "virtual pipeline alone": (
        nothing,
        [f"{M}virtual_pipeline_model_parallel_size=2"],
        f"{M}virtual_pipeline",
        "at least 2 ranks",
        "pipeline_model_parallel_size",
    ),
    "sequence parallel alone": (
        nothing,
        [f"{M}sequence_parallel=true"],
        f"{M}sequence_parallel",
        "one tensor-parallel rank",
        "2 or more",
    ),
    "context parallel ranks": (
        nothing,
        [f"{M}context_parallel_size=2", "launch.nproc_per_node=3"],
        "launch.nproc_per_node",
        "CP 2 = 2",
        "a multiple of 2 ranks",
    ),
    "token budget below the longest sample": (
        nothing,
        ["training.use_rmpad=true", "training.micro_batch_tokens=1"],
        "training.micro_batch_tokens",
        "the longest sample would not fit",
        "or more",
    ),
    "several machines": (
        nothing,
        ["launch.nnodes=2"],
        "launch.nnodes",
        "on the daemon's own machine only",
        "set it to 1, or launch.launcher to slurm",
    ),
    "warm-up too long": (
        nothing,
        ["scheduler.warmup_steps=99"],
        "scheduler.warmup_steps",
        "more than the 12 steps",
        "fewer",
    ),
    "path in a project name": (
        nothing,
        ["trainer.project_name=../../etc"],
        "trainer.project_name",
        "contains a slash",
        "trainer.experiment_name",
    ),
    "no data": (nothing, ["data.train_files=[]"], "data.train_files", "is empty", "sftd prepare"),
    "no model": (
        nothing,
        ["model.partial_pretrain=''"],
        "model.partial_pretrain",
        "is not set",
        "Hugging Face folder",
    ),
    "no such config": (lambda home: home.config.unlink(), [], "run.yaml", "cannot be read", "YAML file"),
    "aliases that multiply": (
        config(
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(
                f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
                for before, name in zip("abcdefg", "bcdefgh", strict=True)
            )
        ),
        [],
        "run.yaml, line 4",
        "aliases expand to",
        "fix the line",
    ),
    "number of 5000 digits": (
        nothing,
        ["trainer.max_steps=" + "9" * 5000],
        "trainer.max_steps=9999",
        "not a whole number of at most 64 bits",
        "fix the line",
    ),
    "number of 5000 digits in a grid": (
        nothing,
        ["--grid", "trainer.max_steps=1," + "9" * 5000],
        "trainer.max_steps=9999",
        "not a whole number of at most 64 bits",
        "fix the line",
    ),
    "pattern without quotes": (
        append("x: *.parquet\n"),
        [],
        "run.yaml, line",
        "not valid YAML",
        "quote a value that begins with *",
    ),
    "another trainer's config": (
        config("{model_name_or_path: m, dataset: d, template: t, cutoff_len: 1, lora_rank: 8, stage: sft}"),
        [],
        "cutoff_len: write `data.sequence_length`",
        "looks like a config of LLaMA-Factory",
        "docs/coming-from.md",
    ),
    "doubtful and strict": (
        nothing,
        ["optimizer.lr=0.5", "--strict"],
        "optimizer.lr",
        "far above",
        "1e-6 to 1e-4",
    ),
    "doubtful grid and strict": (
        nothing,
        ["--grid", "optimizer.lr=0.5,1e-4", "--strict"],
        "optimizer.lr",
        "far above",
        "1e-6 to 1e-4",
    ),
    "devices of nobody and strict": (
        nothing,
        ["launch.nproc_per_node=4", "training.micro_batch_size_per_gpu=1", "launch.device=cpu", "--strict"],
        "launch.nproc_per_node",
        "share the 2 cores",
        "2 or less",
    ),
    "cloud address": (
        nothing,
        ["data.train_files=s3://b/x.parquet"],
        "data.train_files",
        "is a URL",
        "copy it here",
    ),
    "broken YAML": (config("model: [1"), [], "run.yaml, line", "not valid YAML", "fix the line"),
    "key twice": (
        config("trainer: {max_steps: 1, max_steps: 2}"),
        [],
        "run.yaml, line 1",
        "given twice",
        "fix the line",
    ),
    "YAML is a list": (config("- 1"), [], "run.yaml", "not a mapping", "model:"),
    "YAML of Python objects": (
        config("a: !!python/object/apply:os.getcwd []"),
        [],
        "run.yaml",
        "not valid YAML",
        "fix",
    ),
    "no such model": (
        nothing,
        ["model.partial_pretrain=/no/such/model"],
        "model.partial_pretrain",
        "no such folder",
        "config.json",
    ),
    "model of another kind": (
        shape(architectures=["BertModel"]),
        [],
        "model.partial_pretrain",
        "BertModel is not supported",
        "docs/models.md: llama, ",
    ),
    "override that is not read": (
        nothing,
        ["model.override_config={num_hiden_layers: 3}"],
        "model.override_config.num_hiden_layers",
        "not read by the trainer",
        "num_hidden_layers",
    ),
    "heads of nothing": (
        shape(num_attention_heads=0, head_dim=None),
        [],
        "model.partial_pretrain",
        "zero",
        "fix",
    ),
    "no name of a folder for checkpoints": (
        nothing,
        ['checkpoint.save_dir="a\\0b"'],
        "checkpoint.save_dir",
        "NUL",
        "may write to",
    ),
    "a folder for checkpoints that cannot be made": (
        nothing,
        ["checkpoint.save_dir=/proc/nope"],
        "checkpoint.save_dir",
        "No such file or directory",
        "may write to",
    ),
    "a file for checkpoints": (
        nothing,
        ["checkpoint.save_dir=run.yaml"],
        "checkpoint.save_dir",
        "Not a directory",
        "may write to",
    ),
    "priority beyond reason": (
        nothing,
        ["launch.priority=9999999999"],
        "launch.priority",
        "9999999999",
        "a whole number",
    ),
    "model with biases": (
        shape(attention_bias=True),
        [],
        "model.partial_pretrain",
        "attention_bias",
        "a model without it",
    ),
    "model with another activation": (
        shape(hidden_act="gelu"),
        [],
        "model.partial_pretrain",
        "hidden_act 'gelu'",
        "silu",
    ),
    "model config without sizes": (
        shape(hidden_size=None),
        [],
        "model.partial_pretrain",
        "hidden_size",
        "causal language model",
    ),
    "no such data": (
        nothing,
        ["data.train_files=nowhere.parquet"],
        "data.train_files",
        "no such file",
        "check the path",
    ),
    "no such validation data": (
        nothing,
        ["data.val_files=nowhere.parquet"],
        "data.val_files",
        "no such file",
        "check the path",
    ),
    "data is no Parquet": (
        lambda home: (home.path / "train.parquet").write_text("text") and None,
        [],
        "data.train_files",
        "not a Parquet file",
        "sftd prepare",
    ),
    "data without labels": (rows(labels=None), [], "data.train_files", "no column 'labels'", "sftd prepare"),
    "data of texts": (
        rows(input_ids=pa.array(["a", "b", "c"])),
        [],
        "data.train_files",
        "not a list of integers",
        "sftd prepare",
    ),
    "data without rows": (
        lambda home: write_rows(home.path / "train.parquet", 0) and None,
        [],
        "data.train_files",
        "no rows",
        "with data",
    ),
    "lists of unequal length": (
        rows(labels=three(GOOD, GOOD, GOOD)),
        [],
        "data.train_files",
        "input_ids but 3 labels",
        "sftd prepare",
    ),
    "token outside the vocabulary": (
        rows(
            input_ids=three(GOOD, [1, 2, VOCABULARY], GOOD),
            attention_mask=three([1] * 3, [1] * 3, [1] * 3),
            labels=three(GOOD, GOOD, GOOD),
        ),
        [],
        "data.train_files",
        f"token id {VOCABULARY}",
        "tokenizer of the model",
    ),
    "negative token": (
        rows(
            input_ids=three(GOOD, [1, -2, 3], GOOD),
            attention_mask=three([1] * 3, [1] * 3, [1] * 3),
            labels=three(GOOD, GOOD, GOOD),
        ),
        [],
        "data.train_files",
        "token id -2",
        "tokenizer of the model",
    ),
    "no trained label": (
        rows(
            input_ids=three(GOOD, GOOD, GOOD),
            attention_mask=three([1] * 3, [1] * 3, [1] * 3),
            labels=three(*[[-100] * 3] * 3),
        ),
        [],
        "data.train_files",
        "train.parquet: none of the 3 rows",
        "masks",
    ),
    "labels that are shifted": (
        rows(
            input_ids=three(GOOD, GOOD, GOOD),
            attention_mask=None,
            labels=three(*[[2, 3, -100]] * 3),
        ),
        [],
        "data.train_files",
        "the labels are shifted by one, and sftd shifts them itself",
        "labels[i] = input_ids[i]",
    ),
    "packed rows": (
        rows(
            input_ids=three(GOOD, GOOD, GOOD),
            attention_mask=None,
            labels=three(GOOD, GOOD, GOOD),
            position_ids=three(GOOD, [0, 1, 0], GOOD),
        ),
        [],
        "data.train_files",
        "row 0: position_ids splits the row into several samples",
        "training.use_rmpad=true",
    ),
    "labels beyond the cut": (
        nothing,
        ["data.sequence_length=4"],
        "data.train_files",
        "within 4 tokens",
        "sequence_length",
    ),
    "rows too long": (
        nothing,
        ["data.sequence_length=20", "data.truncation=error"],
        "data.train_files",
        "longer than",
        "data.truncation",
    ),
    "nulls": (
        rows(
            input_ids=pa.array([GOOD, None, GOOD], INT),
            attention_mask=three([1] * 3, [1] * 3, [1] * 3),
            labels=three(GOOD, GOOD, GOOD),
        ),
        [],
        "data.train_files",
        "nulls",
        "sftd prepare",
    ),
}


def contents(home: Home) -> list[tuple[object, ...]]:
    """Every row of every table."""
    with closing(sqlite3.connect(home.path / "home" / "sftd.db")) as connection:
        tables = [
            r[0]
            for r in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        return [(t, *row) for t in tables for row in connection.execute(f'SELECT * FROM "{t}"')]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home that holds the run of its config: nothing is wrong with that. Tests copy it."""
    home = Home(tmp_path_factory.mktemp("accepted"), tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in home.env.items():
            patch.setenv(name, value)
        patch.chdir(home.path)
        done = CliRunner().invoke(main, ["submit", "run.yaml", "-q"])
    assert done.exit_code == 0, done.output
    return home.path / "home"


@pytest.fixture
def sftd(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The command in this process, in the home."""
    for name, value in home.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home.path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("name", list(TABLE))
def test_refused(name: str, home: Home, sftd: Callable[..., object], accepted: Path) -> None:
    prepare, overrides, where, what, fix = TABLE[name]
    shutil.copytree(accepted, home.path / "home", dirs_exist_ok=True)
    before = contents(home)

    prepare(home)
    done = sftd("submit", "run.yaml", *overrides)
    assert done.exit_code == 2, done.output  # type: ignore[attr-defined]
    said = done.stderr.replace("\n", " ")  # type: ignore[attr-defined]
    for text in (where, what, fix):
        assert text in said, said
    assert "Traceback" not in said
    assert contents(home) == before


def test_refused_in_an_empty_home_makes_no_database(home: Home, sftd: Callable[..., object]) -> None:
    (home.path / "home").rmdir()
    done = sftd("submit", "run.yaml", "foo=1")
    assert done.exit_code == 2  # type: ignore[attr-defined]
    assert not (home.path / "home").exists()


def test_every_problem_is_told_at_once(sftd: Callable[..., object]) -> None:
    done = sftd("submit", "run.yaml", "optimizer.lrr=1", "trainer.max_steps=x", "scheduler.type=y")
    assert "3 problems" in done.stderr  # type: ignore[attr-defined]


def test_a_doubtful_run_is_queued_with_a_warning_in_its_log(sftd: Callable[..., object], home: Home) -> None:
    done = sftd("submit", "run.yaml", "data.val_files=train.parquet", "--json")
    assert done.exit_code == 0, done.stderr  # type: ignore[attr-defined]
    found = json.loads(done.stdout)  # type: ignore[attr-defined]
    assert any("is the training data" in warning for warning in found["warnings"])
    log = sftd("events", found["run_id"], "--json")
    assert "is the training data" in log.stdout.splitlines()[0]  # type: ignore[attr-defined]


def test_a_config_comes_from_standard_input(home: Home) -> None:
    done = subprocess.run(
        home.command("submit", "-", "-q"),
        input=home.config.read_text(),
        env=home.env,
        cwd=home.path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grid = subprocess.run(
        home.command("submit", "-", "--grid", "optimizer.lr=1e-4,2e-4", "-q"),
        input=home.config.read_text(),
        env=home.env,
        cwd=home.path,
        capture_output=True,
        text=True,
    )
    assert len(grid.stdout.split()) == 2, grid.stderr


@pytest.mark.parametrize(
    "until", ["9" * 5000, "v" + "9" * 5000, "-" + "9" * 5000 + "h", "0001-01-01T00:00", "x" * 5000]
)
def test_a_moment_that_is_none_is_refused(until: str, sftd: Callable[..., object]) -> None:
    run_id = sftd("submit", "run.yaml", "-q").stdout.strip()  # type: ignore[attr-defined]
    done = sftd("replay", run_id, "--until", until)
    assert done.exit_code == 2 or until.startswith("0001"), done.output  # type: ignore[attr-defined]
    assert len(done.stderr) < 600  # type: ignore[attr-defined]
