"""What must not get in, and what must not get out."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from sftd.domain.errors import JournalCorrupt, Refused
from sftd.domain.log import events as e
from sftd.domain.run import ids
from sftd.domain.run.retention import deletable
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from sftd.domain.text.credentials import without_credentials
from sftd.launcher.command import environment, torchrun_argv
from sftd.operations.driving.checkpoints import unkept
from sftd.store.database.engine import shown_url
from sftd.wire.attempt import journal
from sftd.wire.attempt.direct_run import DirectRun, DirectSubmission
from sftd.wire.attempt.directory import AttemptDir
from sftd.wire.attempt.secrets import Secrets
from sftd.wire.checkpoint.directory import is_checkpoint_of
from sftd.wire.spec import yaml_text
from tests.builders.paths import ROOT

SECRET = "hush-hush-9"
CONFIG = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"]}}


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "x" * 201])
@pytest.mark.parametrize("key", ["trainer.project_name", "trainer.experiment_name"])
def test_names_are_printable(key: str, name: str) -> None:
    if (key, name) == ("trainer.experiment_name", ""):
        parse(CONFIG, [(key, name)])  # no name
        return
    with pytest.raises(Refused) as refused:
        parse(CONFIG, [(key, name)])
    assert refused.value.problems[0].where == key


@pytest.mark.parametrize(
    "name", ["мой эксперимент", "a/b", "..", "../x", ".hidden", "-rf", "50%", "x" * 200, "é" * 200]
)
def test_a_name_for_people_becomes_one_plain_folder(name: str) -> None:
    parse(CONFIG, [("trainer.experiment_name", name)])
    folder = ids.folder_name(name)
    assert folder == Path(folder).name
    assert folder[0] not in ".-"
    assert len(folder.encode()) <= 200


def test_different_names_have_different_folders_and_plain_ones_their_own() -> None:
    given = [
        "a/b",
        "a_b",
        "a%2Fb",
        "a b",
        "..",
        "%2E.",
        "x" * 199 + "/",
        "x" * 198 + "//",
        "é" * 150,
        "é" * 151,
    ]
    assert len({ids.folder_name(name) for name in given}) == len(given)
    # As runs of earlier versions have it.
    assert ids.folder_name("first try_2.@+-") == "first try_2.@+-"


@pytest.mark.parametrize("run_id", ["..", "../../etc", "a/b", "/etc", ".x", "", "a b", "a\n", "x" * 65])
def test_a_run_id_from_elsewhere_is_asked_before_a_folder_is_named_by_it(tmp_path: Path, run_id: str) -> None:
    assert not ids.is_run_id(run_id)
    run = DirectRun(tmp_path / "run")
    run.path.mkdir()
    event = e.RunSubmitted(
        spec={}, spec_digest="s", planned_steps=1, user="ada", data={}, model={}, sftd_version="0"
    )
    run.write_submission(DirectSubmission.of(run_id, 1, event))
    with pytest.raises(Refused, match="is not a run id"):
        run.submission()


def test_every_made_run_id_is_one() -> None:
    assert all(ids.is_run_id(ids.run_id(bytes([n, 255 - n, n, n]))) for n in range(256))


def published(path: str) -> journal.Line:
    event = e.CheckpointPublished(step=5, path=path, bytes=1, manifest_digest="m", seconds=1.0)
    return journal.Line(number=7, occurred_at=1, event=event)


@pytest.mark.parametrize(
    "path", ["/etc", "/c/../etc", "/c/x/../../etc", "step-00000005", "/c/sub/step-5", "/c"]
)
def test_a_journal_names_no_checkpoint_outside_of_its_folder(path: str) -> None:
    journal.check_paths([published("/c/step-00000005")], "/c")
    with pytest.raises(JournalCorrupt, match="line 7: the checkpoint"):
        journal.check_paths([published(path)], "/c")


def test_only_a_checkpoint_of_the_run_is_deleted_as_one(tmp_path: Path) -> None:
    """An imported history may say anything of any path."""
    folders = {name: tmp_path / name for name in ("mine", "others", "photos")}
    for folder in folders.values():
        folder.mkdir()
    (folders["mine"] / "manifest.json").write_text(json.dumps({"run_id": "run-a"}))
    (folders["others"] / "manifest.json").write_text(json.dumps({"run_id": "run-b"}))
    assert [name for name, path in folders.items() if is_checkpoint_of(str(path), "run-a")] == ["mine"]
    doomed = tuple(
        CheckpointInfo(
            step=n,
            path=str(path),
            bytes=1,
            manifest_digest="m",
            tokens_total=0,
            version=n,
            published_at=0,
            superseded=True,
        )
        for n, path in enumerate((*folders.values(), tmp_path / "gone"), 1)
    )
    run = Run("run-a", status="succeeded", checkpoints=doomed)
    assert len(deletable(run)) == 4
    assert [Path(c.path).name for c in unkept(run)] == ["mine"]


def test_the_trainer_knows_no_passwords_of_ours() -> None:
    ours = {
        "SFTD_DATABASE_URL": f"postgresql://a:{SECRET}@h/d",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "MLFLOW_TRACKING_TOKEN": SECRET,
        "MLFLOW_TRACKING_CLIENT_CERT_PATH": SECRET,
        "PGPASSWORD": SECRET,
        "SFTD_NOTIFY_WEBHOOK": f"https://hooks/{SECRET}",
        "SFTD_NOTIFY_COMMAND": f"notify --token {SECRET}",
    }
    given = environment(ours | {"PATH": "/bin"}, token="t", device="cpu", threads=1, devices=[])
    assert SECRET not in str(given)
    assert given["PATH"] == "/bin"


@pytest.mark.parametrize(
    "name",
    ["DB_PASSWORD", "MY_PASSWD", "HF_TOKEN", "APP_SECRET", "OPENAI_API_KEY", "AWS_CREDENTIAL", "lower_token"],
)
def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(name: str) -> None:
    found = Secrets.of({name: SECRET, "PATH": "/usr/local/bin", "SHORT_KEY": "abc"})
    text = f"{SECRET}: x{SECRET}{SECRET}y, /usr/local/bin, abc, hush-hush, https://ada:{SECRET[:4]}@host/x"
    assert found.hide(text) == "***: x******y, /usr/local/bin, abc, hush-hush, https://ada:***@host/x"
    # What is written beside the attempt does not hold it either.
    assert SECRET not in msgspec.json.encode(found).decode()


def test_gpus_are_numbered_as_nvml_does() -> None:
    """CUDA's own order puts the fastest first: with unlike GPUs a run would get others than those that it was given."""
    given = environment(
        {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, token="t", device="cuda", threads=1, devices=["cuda:2"]
    )
    assert (given["CUDA_DEVICE_ORDER"], given["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "2")


def test_ranks_meet_on_the_loopback_device_unless_told_otherwise(tmp_path: Path) -> None:
    """`test_cancel_checkpoints_and_resume_goes_on` sees that they do."""
    argv = torchrun_argv(Spec(), AttemptDir(tmp_path))
    assert "--standalone" not in argv
    assert "--local-addr=127.0.0.1" in argv
    given = environment({"NCCL_SOCKET_IFNAME": "eth0"}, token="t", device="cpu", threads=1, devices=[])
    assert (given["NCCL_SOCKET_IFNAME"], given["GLOO_SOCKET_IFNAME"]) == ("eth0", "lo")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://ada:{SECRET}@host:5432/db",
        f"postgresql://host/db?user=ada&password={SECRET}",
        f"postgresql://ada:x/{SECRET}@host/db",
        f"postgresql://ada:x@{SECRET}@host/db",
        f"http://ada:x@{SECRET}@mlflow:5000",
        f"postgresql://host/db?sslpassword={SECRET}&x=1",
        f"http://ada:{SECRET}@mlflow:5000",
        f"connection to https://ada:{SECRET}@mlflow/api refused",
    ],
)
def test_urls_are_shown_without_passwords(url: str) -> None:
    assert SECRET not in without_credentials(url)
    if url.startswith("postgresql"):
        assert SECRET not in shown_url(url)
    else:
        assert "mlflow" in without_credentials(url)


def test_yaml_makes_no_objects() -> None:
    for text in ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/tuple [1]"):
        with pytest.raises(Refused):
            yaml_text.load_yaml(text, "file")
    assert issubclass(yaml_text.Loader, yaml.SafeLoader)


def calls(name: str, kinds: tuple[type[ast.expr], ...] = (ast.Attribute, ast.Name)) -> list[str]:
    """Where the package calls a function (`ast.Name`) or method (`ast.Attribute`) of this name."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "sftd").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, kinds)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == name
    ]


def test_what_can_run_others_code_is_called_where_it_is_known() -> None:
    """A new caller belongs on this list only with a look at what it is given."""
    assert calls("eval", (ast.Name,)) + calls("exec", (ast.Name,)) == []
    assert calls("system") == []
    assert calls("full_load") + calls("unsafe_load") + calls("safe_load_all") == []
    # All of local folders, and each says what is trusted (demo_model.py: of the model that it downloads by digest). A proof
    # trusts nothing, and the families that are trained need no code of their own.
    assert sorted(calls("from_pretrained")) == sorted(
        [
            "sftd/trainer/decoding/prompts.py",
            *["sftd/trainer/tools/export/prove.py"] * 4,
            "sftd/trainer/tools/prepare/demo_model.py",
            "sftd/trainer/tools/prepare/demo_model.py",
            "sftd/trainer/chat/tokenizer.py",
        ]
    )


def test_no_loader_trusts_code_by_itself() -> None:
    """Whether a model folder's Python code may run is the user's to say: never a constant, and never left to a default."""
    said = [
        ast.unparse(keyword.value)
        for path in sorted((ROOT / "sftd").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert "True" not in said
    assert "model.trust_remote_code" in said


def test_remote_code_is_off_and_says_so_when_it_is_on() -> None:
    spec, warnings = parse(CONFIG)
    assert spec.model.trust_remote_code is False
    assert not [w for w in warnings if w.where == "model.trust_remote_code"]
    _, warnings = parse(CONFIG, [("model.trust_remote_code", True)])
    [warning] = [w for w in warnings if w.where == "model.trust_remote_code"]
    assert "runs with your rights" in warning.what


def test_code_in_a_model_folder_runs_only_when_trusted(tmp_path: Path) -> None:
    """A tokenizer that comes as Python code, loaded by the real transformers as the trainer and `prepare` do."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}})
    )
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    proof = tmp_path / "it-ran"
    (model / "odd.py").write_text(
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizer\n"
        "class Odd(PreTrainedTokenizer): pass\n"
    )
    script = """
import sys
from pathlib import Path
from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.chat.tokenizer import load_tokenizer
for trusted in (False, True):
    try:
        load_tokenizer(Path(sys.argv[1]), trust_remote_code=trusted)
    except PrepareError:  # it is no tokenizer, either way
        print(trusted, Path(sys.argv[2]).exists())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(proof)],
        env={"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["False False", "True True"], done.stderr
