"""Spec files as users write them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sftd.domain.errors import Refused
from sftd.wire.spec import file as specfile

# The config that sftd was asked to accept as it is.
ASKED_FOR = """
model:
  name: megatron-sft
  partial_pretrain: "your-model-path"  # Path to pretrained model
  enable_gradient_checkpointing: true
  megatron:
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 2
    virtual_pipeline_model_parallel_size: 2
    use_distributed_optimizer: true
training:
  micro_batch_size_per_gpu: 4
  gradient_accumulation_steps: 4
  use_rmpad: true
data:
  train_files:
    - "/path/to/train_data.parquet"
  val_files:
    - "/path/to/val_data.parquet"
  train_batch_size: 64
  sequence_length: 2048
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(ASKED_FOR)
    return path


def test_the_config_that_was_asked_for_is_accepted_as_it_is(spec_file: Path) -> None:
    spec, warnings = specfile.read(str(spec_file), [], "/base")
    assert spec.model.partial_pretrain == "/base/your-model-path"
    assert spec.data.train_files == ["/path/to/train_data.parquet"]
    assert (spec.world_size, spec.data_parallel_size, spec.num_microbatches) == (4, 1, 16)
    assert [w.where for w in warnings] == ["training.gradient_accumulation_steps"]


def test_on_eight_gpus_it_is_told_that_it_accumulates_eight_times(spec_file: Path) -> None:
    spec, warnings = specfile.read(str(spec_file), ["launch.nproc_per_node=8"], "/base")
    assert (spec.data_parallel_size, spec.num_microbatches) == (2, 8)
    (warning,) = warnings
    assert warning.where == "training.gradient_accumulation_steps"
    assert warning.what == (
        "is 4, but the 64 samples of a step, packed into micro-batches of 8192 tokens, make at most 8 on each of 2 "
        "data-parallel ranks"
    )
    assert spec.training.gradient_accumulation_steps == 8


def test_on_sixteen_gpus_the_config_agrees_with_itself(spec_file: Path) -> None:
    assert specfile.read(str(spec_file), ["launch.nproc_per_node=16"], "/base")[1] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.e-5", 1e-5),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("1_000", 1000),
        ("7", 7),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("True", True),
        ("false", False),
        ("2024-01-01", "2024-01-01"),
        ("1e5x", "1e5x"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("null", None),
        ("", None),
        ("[a, 1e-3]", ["a", 1e-3]),
        ("'1e-5'", "1e-5"),
    ],
)
def test_values_are_what_users_mean(text: str, value: object) -> None:
    ((_, found),) = specfile.parse_overrides([f"key={text}"])
    assert found == value
    assert type(found) is type(value)


def test_infinity_and_nan_are_numbers_in_yaml() -> None:
    ((_, infinite), (_, nan)) = specfile.parse_overrides(["a=-.inf", "b=.nan"])
    assert infinite == float("-inf")
    assert nan != nan


def test_a_value_may_hold_an_equals_sign() -> None:
    assert specfile.parse_overrides(["a.b=x=y"]) == [("a.b", "x=y")]


@pytest.mark.parametrize("argument", ["optimizer.lr", "=3", ""])
def test_an_override_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(Refused, match="key=value"):
        specfile.parse_overrides([argument])


def test_an_override_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(Refused, match="not valid YAML"):
        specfile.parse_overrides(["a=[1"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model:\n  name: a\n  name: b\n", "line 3: is not valid YAML: the key 'name' is given twice"),
        ("a: 1\nb: 2\na: 3\n", "line 3"),
        ("model: [", "is not valid YAML"),
        ("model:\n\tname: a\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("- a\n- b\n", "is not a mapping of sections"),
        ("just a text\n", "is not a mapping of sections"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("? [a, b]\n: 1\n", "is not valid YAML"),
        ("? {a: 1}\n: 1\n", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as refused:
        specfile.load_file(str(path))
    assert says in str(refused.value)
    assert "bad.yaml" in str(refused.value)


def test_merge_keys_work_and_are_not_taken_for_duplicates() -> None:
    tree = specfile.load_yaml("base: &b {lr: 1, x: 2}\nother:\n  <<: *b\n  lr: 3\n", "text")
    assert tree["other"] == {"lr": 3, "x": 2}


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xff\n")
    for path, says in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (latin, "not UTF-8"),
    ):
        with pytest.raises(Refused, match=says):
            specfile.load_file(str(path))


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert specfile.load_file(str(path)) == {}


def test_relative_paths_are_taken_from_the_base(spec_file: Path) -> None:
    overrides = [
        "data.train_files=[a.parquet, ../b.parquet]",
        "data.val_files=~/v.parquet",
        "checkpoint.save_dir=ck",
    ]
    spec, _ = specfile.read(str(spec_file), overrides, "/base/here")
    assert spec.data.train_files == ["/base/here/a.parquet", "/base/b.parquet"]
    assert spec.data.val_files == [str(Path.home() / "v.parquet")]
    assert spec.checkpoint.save_dir == "/base/here/ck"
    assert specfile.read(str(spec_file), [], "/base")[0].checkpoint.save_dir == ""


def test_without_a_file_the_overrides_say_everything() -> None:
    spec, _ = specfile.read(None, ["model.partial_pretrain=m", "data.train_files=t.parquet"], "/base")
    assert (spec.model.partial_pretrain, spec.data.train_files) == ("/base/m", ["/base/t.parquet"])
    with pytest.raises(Refused, match="is not set"):
        specfile.read(None, [], "/base")


def test_standard_input_is_a_spec_file(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeff" + ASKED_FOR
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    spec, _ = specfile.read("-", [], "/base")
    assert spec.model.partial_pretrain == "/base/your-model-path"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"- 1")))
    with pytest.raises(Refused, match="standard input: is not a mapping"):
        specfile.load_file("-")


@pytest.mark.parametrize(
    ("path", "where"),
    [("nowhere.yaml", "nowhere.yaml"), ("odd.yaml", "odd.yaml"), ("list.yaml", "list.yaml")],
)
def test_a_file_that_is_no_config_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_bytes(b"\xff\xfe\xff")
    Path("list.yaml").write_text("- 1")
    with pytest.raises(Refused) as refused:
        specfile.load_file(path)
    (problem,) = refused.value.problems
    assert problem.where == where
    assert problem.what
    assert problem.fix


@pytest.mark.parametrize("argument", ["optimizer.lr", "=1e-5", ""])
def test_an_override_that_is_none_is_named_with_what_to_do(argument: str) -> None:
    with pytest.raises(Refused) as refused:
        specfile.parse_overrides([argument])
    (problem,) = refused.value.problems
    assert problem.where == argument
    assert "optimizer.lr=1e-5" in problem.fix
    assert specfile.parse_overrides([" a.b =1", "c=d=e"]) == [("a.b", 1), ("c", "d=e")]
