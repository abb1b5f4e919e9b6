"""What users write where a path belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sftd.domain.errors import Refused
from sftd.domain.spec.spec import Spec
from sftd.wire.model.hub_cache import cached_model
from sftd.wire.spec import file as spec_file
from sftd.wire.spec.paths import model_folder, resolve

TRAIN = "data.train_files"
MODEL = "model.partial_pretrain"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    for name in (
        "b.parquet",
        "a.parquet",
        "notes.txt",
        "sub/c.parquet",
        "sub/_d.parquet",
        "sub/.e.parquet",
        "none/x",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    return base


def files(base: Path, *texts: str, beside: Path | None = None, **environ: str) -> list[str]:
    spec = msgspec.convert({"data": {"train_files": texts}}, Spec)
    found = resolve(spec, str(base), str(beside) if beside else None, environ).data.train_files
    return [str(Path(path).relative_to(base)) for path in found]


def model(base: Path, text: str, **environ: str) -> str:
    spec = msgspec.convert({"model": {"partial_pretrain": text}}, Spec)
    return resolve(spec, str(base), None, environ).model.partial_pretrain


def problem(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(Refused) as refused:
        call(*arguments, **named)
    (found,) = refused.value.problems
    return f"{found.where}: {found.what} | {found.fix}"


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["*.parquet"], ["a.parquet", "b.parquet"]),
        (["[b-z].parquet"], ["b.parquet"]),
        (["**/*.parquet"], ["a.parquet", "b.parquet", "sub/_d.parquet", "sub/c.parquet"]),
        (["sub"], ["sub/c.parquet"]),
        (["sub/", "a.parquet"], ["sub/c.parquet", "a.parquet"]),
        (["b.parquet", "a.parquet"], ["b.parquet", "a.parquet"]),
        (["$WHERE/c.parquet"], ["sub/c.parquet"]),
        (["${WHERE}/*.parquet"], ["sub/_d.parquet", "sub/c.parquet"]),
        (["gone.parquet"], ["gone.parquet"]),
    ],
)
def test_patterns_folders_and_variables_become_files_in_order(
    base: Path, texts: list[str], found: list[str]
) -> None:
    assert files(base, *texts, WHERE="sub") == found


@pytest.mark.parametrize(
    "name", ["$HOME.parquet", "[1].parquet", "what?.parquet", "${x}.parquet", "*.parquet", "s3://b"]
)
def test_a_file_of_the_very_name_is_meant(base: Path, name: str) -> None:
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).touch()
    assert files(base, name, HOME="/elsewhere") == [str(Path(name))]


@pytest.mark.parametrize("base_name", ["[x]", "a*b", "q?"])
def test_the_base_is_not_a_pattern(tmp_path: Path, base_name: str) -> None:
    base = tmp_path / base_name
    base.mkdir()
    (base / "a.parquet").touch()
    assert files(base, "*.parquet") == ["a.parquet"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3://bucket/x.parquet", "is a URL"),
        ("hf://datasets/a/b", "is a URL"),
        ("https://host/x.parquet", "copy it here"),
        ("file:///x.parquet", "write the path alone"),
        ("*.csv", "*.csv matches no file in"),
        ("none", "is a folder without Parquet files of its own"),
        ("$NOWHERE/x", "the environment variable NOWHERE is not set"),
        ("${trainer.project_name}/x", "is not an environment variable"),
    ],
)
def test_what_cannot_be_meant_is_refused(base: Path, text: str, says: str) -> None:
    assert says in problem(files, base, text)


def test_a_file_beside_the_config_is_named_and_not_taken(base: Path, tmp_path: Path) -> None:
    (base / "sub" / "run.yaml").touch()
    for text in ("c.parquet", "c*.parquet"):
        said = problem(files, base, text, beside=base / "sub")
        assert f"{text} is not in {base}, where you submit, but beside the config" in said
        assert f"write sub/{text}" in said
    assert files(base, "a.parquet", beside=base / "sub") == ["a.parquet"]
    config = base / "sub" / "run.yaml"
    config.write_text("model: {path: m}\ndata: {train_files: c.parquet}\n")
    with pytest.raises(Refused, match="beside the config"):
        spec_file.read(str(config), [], str(base))


def test_every_path_is_checked_at_once(base: Path) -> None:
    spec = msgspec.convert(
        {
            "model": {"partial_pretrain": "s3://m"},
            "data": {"train_files": ["*.x", "$A"], "val_files": ["none"]},
            "checkpoint": {"save_dir": "gs://c"},
        },
        Spec,
    )
    with pytest.raises(Refused) as refused:
        resolve(spec, str(base), None, {})
    assert [p.where for p in refused.value.problems] == [
        MODEL,
        TRAIN,
        TRAIN,
        "data.val_files",
        "checkpoint.save_dir",
    ]


def write_cache(cache: Path, name: str, commit: str = "c0ffee") -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_a_hub_id_is_looked_up_in_the_local_cache(base: Path, tmp_path: Path) -> None:
    snapshot = write_cache(tmp_path / "hf" / "hub", "org/name")
    plain = write_cache(tmp_path / "hf" / "hub", "gpt2")
    home = str(tmp_path / "hf")
    assert model(base, "org/name", HF_HOME=home) == str(snapshot)
    assert model(base, "org/name", HF_HUB_CACHE=f"{home}/hub", HF_HOME="/nowhere") == str(snapshot)
    assert model(base, "gpt2", HF_HOME=home) == str(plain)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "huggingface").symlink_to(tmp_path / "hf")
    assert cached_model("org/name", {"XDG_CACHE_HOME": str(tmp_path / "cache")}) is not None
    # A folder wins.
    (base / "org" / "name").mkdir(parents=True)
    assert model(base, "org/name", HF_HOME=home) == str(base / "org" / "name")


def test_a_hub_id_that_is_not_cached_has_the_command_that_fetches_it(base: Path, tmp_path: Path) -> None:
    said = problem(model, base, "org/name-1.5B", HF_HOME=str(tmp_path))
    assert "no model of that name in the Hugging Face cache" in said
    assert "`hf download org/name-1.5B --local-dir DIR`" in said
    assert "`hf download org/name --local-dir DIR`" in problem(
        model, base, "https://huggingface.co/org/name/tree/main"
    )
    # A folder of the organisation's name: a path with a slip.
    assert model(base, "sub/model", HF_HOME=str(tmp_path)) == str(base / "sub" / "model")


def test_prepare_looks_a_hub_id_up_as_submit_does(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"--model: .*no model of that name in the Hugging Face cache"):
        model_folder("--model", "org/none", str(base), {"HF_HUB_CACHE": str(tmp_path)})
    assert model_folder("--model", str(base), "/") == str(base)


def test_an_adapter_is_found_as_a_model_is(base: Path) -> None:
    given = {"model": {"partial_pretrain": "/m", "lora": {"adapter": "$WHERE"}}}
    spec = msgspec.convert(given, Spec)
    assert resolve(spec, str(base), None, {"WHERE": "sub"}).model.lora.adapter == str(base / "sub")
    assert "model.lora.adapter: the environment variable WHERE" in problem(resolve, spec, str(base), None, {})


@pytest.mark.parametrize("commit", ["", "..", "../../x", "a/b"])
def test_a_cache_that_names_another_folder_is_not_followed(tmp_path: Path, commit: str) -> None:
    write_cache(tmp_path, "org/name")
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    assert cached_model("org/name", {"HF_HUB_CACHE": str(tmp_path)}) is None


def test_the_paths_of_an_earlier_spec_stay_as_they_are(base: Path) -> None:
    given = {
        "model": {"partial_pretrain": "/gone/$X/m", "lora": {"rank": 8, "adapter": "/gone/$X/a"}},
        "data": {"train_files": ["/gone/[1]*.parquet", str(base / "sub")]},
    }
    spec = msgspec.convert(given, Spec)
    assert resolve(spec, str(base), None, {}, resolved=spec) == spec
    changed, _ = spec_file.change(spec, ["data.val_files=*.parquet"], str(base))
    assert changed.data.train_files == spec.data.train_files
    assert changed.data.val_files == [str(base / "a.parquet"), str(base / "b.parquet")]
