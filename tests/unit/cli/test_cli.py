"""Every command explains itself, starts light, and answers in the form that scripts rely on."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml
from click.testing import CliRunner
from rich.text import Text

from sftd import settings
from sftd.cli import COMMANDS, HINTS, main
from sftd.cli.submit.show_config import as_yaml
from sftd.cli.terminal import output
from sftd.cli.terminal.output import summary
from sftd.cli.terminal.run_details import history_table, what_is_trained
from sftd.domain.errors import Problem, Refused
from sftd.domain.log import events
from sftd.domain.log.events import Recorded
from sftd.domain.repro.steps import REDONE_DIFFERS
from sftd.domain.run.state import Run
from sftd.domain.spec.model_section import Lora, Model
from sftd.domain.spec.sections import Optimizer, Trainer
from sftd.domain.spec.spec import Spec
from tests.builders import json_fields

HEAVY = (
    "torch",
    "transformers",
    "megatron",
    "mlflow",
    "pandas",
    "accelerate",
    "pyarrow",
    "sqlalchemy",
    "alembic",
)


def every_command() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", c) for sub, c in command.commands.items())


@pytest.mark.parametrize(
    ("name", "command"), list(every_command()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_command_has_help_and_example(name: str, command: click.Command) -> None:
    shown = CliRunner().invoke(main, [*name.split(), "--help"])
    assert shown.exit_code == 0
    assert "Example:" in shown.output
    assert f"sftd {name}" in shown.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"sftd {name} {parameter.opts[0]} has no help"


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ("plan", "run.yaml", "--memory", value)
            for value in ("nan", "inf", "-inf", "0", "-5", "1e7", "lots")
        ),
        *(("compare", "a", "b", "--price", value) for value in ("nan", "inf", "-1")),
        *(("prepare", "x", "--model", "m", "--out", "o", "--val-fraction", v) for v in ("nan", "1", "0")),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_what_is_no_number_or_out_of_range_is_refused(arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}': " in done.output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_group_help_says_what_the_command_says(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert COMMANDS[name][1].endswith(".")
    assert (command.help or "").strip()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ls", "--help"], ["submit", "--help"], ["demo", "--help"]]
)
def test_help_starts_light(arguments: list[str]) -> None:
    script = (
        "import sys; from sftd.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_ls_never_loads_the_trainers_libraries(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    script = (
        "import sys; from sftd.cli import main\n"
        "try: main(['ls', '--json'])\n"
        "except SystemExit: pass\n"
        "print([m for m in (*sys.argv[1:], 'torch', 'transformers', 'megatron', 'mlflow', 'pyarrow') if m in sys.modules])"
    )
    # The first one makes the database. The next has no use for what makes tables, nor for the other kind of database.
    for unused in ([], ["alembic", "sqlalchemy.dialects.postgresql"]):
        listing = [sys.executable, "-c", script, *unused]
        done = subprocess.run(listing, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["[]", "[]"]


def test_unknown_command_names_the_nearest() -> None:
    shown = CliRunner().invoke(main, ["sumbit"])
    assert shown.exit_code == 2
    assert "Did you mean `sftd submit`?" in shown.output


@pytest.mark.parametrize(
    "command",
    [
        "show",
        "events",
        "logs",
        "watch",
        "compare no-such-run",
        "replay",
        "verify",
        "data --step 1",
        "resume",
        "cancel",
        "hold",
        "release",
        "pause",
        "generate -p x",
        "export",
        "fork",
        "lineage",
        "checkpoints",
        "gc",
        "mlflow check",
        "mlflow rebuild",
        "mlflow register",
        "ui",
    ],
)
def test_unknown_run_is_refused(command: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    more = ["somewhere"] if command in ("export", "mlflow register") else []
    shown = CliRunner().invoke(main, [*command.split(), "no-such-run", *more])
    assert shown.exit_code == 2
    assert "There is no run 'no-such-run'" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "r"], "Missing option '-p' / '--prompt'"),
        (["import", "nowhere"], "it has no run.json"),
        (["export", "r"], "Missing argument 'DIR'"),
        (["config", "data.train_filse"], "Did you mean data.train_files"),
    ],
)
def test_what_a_command_lacks_is_said(
    arguments: list[str], said: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 2
    assert said in shown.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("word", "keys", "remark"),
    [
        (
            "packing",
            {"training.use_rmpad"},
            "packing is a name of LLaMA-Factory, TRL; here it is `training.use_rmpad`",
        ),
        ("PACKING", {"training.use_rmpad"}, ""),
        ("learning_rate", {"optimizer.lr"}, "here it is `optimizer.lr`"),
        ("optim.lr_decay", {"scheduler.type"}, ""),
        ("cutoff", {"data.sequence_length"}, ""),
        ("hub id", {"model.partial_pretrain"}, ""),
        ("scheduler.warmup", {"scheduler.warmup_steps", "scheduler.warmup_ratio"}, ""),
        ("lora_r", {"model.lora.rank"}, "here it is `model.lora.rank`"),
        ("peft_use_dora", set(), "has no counterpart here: plain LoRA"),
    ],
)
def test_keys_are_found_by_their_names_elsewhere_and_their_meaning(
    word: str, keys: set[str], remark: str
) -> None:
    shown = CliRunner().invoke(main, ["config", word, "--json"])
    assert shown.exit_code == 0, shown.stderr
    for row in json.loads(shown.stdout):
        json_fields.check("config", row)
    assert {row["key"] for row in json.loads(shown.stdout)} == keys
    assert remark in shown.stderr
    assert bool(remark) == bool(shown.stderr)


def test_settings_are_named_when_wrong(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_CPU_SLOTS", "many")
    shown = CliRunner().invoke(main, ["ls"])
    assert shown.exit_code == 2
    assert "SFTD_CPU_SLOTS" in shown.stderr


@pytest.mark.parametrize(
    ("file", "variable", "limit"),
    [
        ("", None, None),
        ("[limits]\nuser = 4\n", None, 4),
        ("[limits]\nuser = 4\n", "2", 2),
        ("[limits]\nuser = 0\n", None, "not a number of devices above 0"),
        ("limits = 4\n", None, "below it"),
        ("user_limit = 4\n", None, "user_limit is not a setting"),
        ("[limit]\nuser = 4\n", None, "limit is not a setting. Did you mean limits"),
        ("[limits]\nusers = 4\n", None, "limits.users is not a setting. Did you mean limits.user"),
        ("backoff_second = 4\n", None, "Did you mean backoff_seconds"),
        ("", "1.5", "SFTD_LIMIT_USER"),
    ],
)
def test_limits_are_settings(
    file: str, variable: str | None, limit: int | str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(file)
    env = {"SFTD_HOME": str(tmp_path)} | ({"SFTD_LIMIT_USER": variable} if variable else {})
    if isinstance(limit, str):
        with pytest.raises(settings.SettingsError, match=limit):
            settings.read(env)
    else:
        assert settings.read(env).user_limit == limit


def test_a_server_database_is_not_changed_behind_ones_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("SFTD_DATABASE_URL", "postgresql://someone:hush@127.0.0.1:1/none")
    shown = CliRunner().invoke(main, ["ls"])
    assert shown.exit_code == 1
    assert "does not answer" in shown.stderr
    assert "hush" not in shown.output


def test_json_is_json(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    shown = CliRunner().invoke(main, ["ls", "--json"])
    assert json.loads(shown.stdout) == []


@pytest.mark.parametrize("arguments", [["ls"], ["init"], ["daemon", "--status"]])
def test_a_home_that_is_a_file_is_a_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.write_text("")
    monkeypatch.setenv("SFTD_HOME", str(home))
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 1
    assert str(home) in shown.stderr
    assert isinstance(shown.exception, SystemExit)


def test_secrets_in_a_url_are_not_shown() -> None:
    from sftd.store.database.engine import shown_url

    for url in (
        "postgresql://me:s3cret@host/db",
        "postgresql://host/db?password=s3cret&sslpassword=s3cret",
        # Neither @ nor / of the password is escaped.
        "postgresql://me:p@s3cret/w@host/db",
    ):
        assert "s3cret" not in shown_url(url)
    assert shown_url("postgresql://host:port/db") == "(not a database URL)"


def test_ui_says_what_is_no_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "/some/mlruns")
    shown = CliRunner().invoke(main, ["ui"])
    assert shown.exit_code == 2
    assert "neither a database nor a server" in shown.stderr.replace("\n", " ")


def test_the_page_is_not_served_on_a_port_that_another_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = CliRunner().invoke(main, ["ui", "--port", str(port)])
    assert done.exit_code == 2
    assert f"another program listens on 127.0.0.1:{port}" in done.output


@pytest.mark.parametrize("command", ["mlflow check", "mlflow rebuild", "mlflow register r m"])
def test_nothing_is_done_with_an_mlflow_that_is_turned_off(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTD_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    shown = CliRunner().invoke(main, command.split())
    assert shown.exit_code == 2
    assert "MLFLOW_TRACKING_URI: it is empty" in shown.stderr


def test_a_row_is_shown_with_both_of_its_kinds() -> None:
    from sftd.cli.look.data import _marked

    question = {"text": "What is\nthe capital of France, the one in Europe?", "trained": False}
    shown = _marked([question, {"text": "Paris.", "trained": True}]).plain
    assert shown == "What is the capital of France, the …«Paris.»"


def test_the_config_of_a_run_is_the_same_when_it_is_submitted_again() -> None:
    spec = Spec(
        model=Model(partial_pretrain="/m", override_config={"rope_theta": 1e6}),
        optimizer=Optimizer(lr=3e-4),
        trainer=Trainer(sample_prompts=["who?", "#1: \u00e9"]),
    )
    shown = as_yaml(Run("r", spec=spec, spec_digest="d" * 64))
    assert msgspec.convert(yaml.safe_load(shown), Spec) == spec
    set_here, _, defaults = shown.partition("# The defaults:\n")
    assert "lr: 0.0003" in set_here
    assert "shuffle" not in set_here
    assert "#   shuffle: true" in defaults
    assert all(line.startswith("# ") for line in defaults.splitlines())


def test_a_path_is_not_broken_on_a_narrow_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/data/" + "long/" * 20
    facts = [("model", Text(path)), ("message", Text("some words that are wrapped " * 3))]
    output.print_facts(output.console(), facts)
    shown = capsys.readouterr().out
    assert f"model    {path}\n" in shown
    assert "\n         " in shown, "the message is, below itself"


def test_what_somebody_gave_as_a_reason_does_nothing_to_a_terminal() -> None:
    shown = summary(events.StopRequested(by="ada", reason="away\x1b]0;x\x07\nnow"))
    assert shown == "by ada: away ]0;x  now"
    assert output.changes({"data.train_files": [["a\x1b[2J"], "b\x9b"]}) == [
        'data.train_files: ["a\\u001b[2J"] → b '
    ]


def test_a_span_of_a_clock_that_was_set_back_is_not_known() -> None:
    spans = (None, -86351.0, -0.2, 0.0, 45.0, 200.0, 7500.0, 356_400.0)
    assert [output.duration(span) for span in spans] == [
        "",
        "?",
        "0s",
        "0s",
        "45s",
        "3m20s",
        "2h05m",
        "4d03h",
    ]


def test_numbers_that_are_not_finite_have_their_names_in_json() -> None:
    detail = {"loss": {"recorded": math.nan, "redone": -math.inf}, "steps": [math.inf, 1.5]}
    assert output.json_line(detail) == (
        '{"loss":{"recorded":"NaN","redone":"-Infinity"},"steps":["Infinity",1.5]}'
    )


def test_an_anomaly_is_told_in_words_and_many_of_a_kind_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"recorded": "a" * 64, "redone": "b" * 64}
    detail = {"loss": {"recorded": 0.1, "redone": 0.10000000000000002}, "samples_digest": digests}
    odd = events.AnomalyDetected(step=7, what=REDONE_DIFFERS, detail=detail)
    told = "loss: log 0.1, now 0.10000000000000002  samples: log aaaaaaaaaaaa, now bbbbbbbbbbbb"
    assert summary(odd) == f"step 7: {REDONE_DIFFERS}  {told}"
    spike = events.AnomalyDetected(step=8, what="loss_spike", detail={"loss": math.nan, "median": None})
    assert summary(spike) == "step 8: loss_spike  loss nan"

    monkeypatch.setenv("COLUMNS", "200")
    recorded = [
        Recorded(
            position=n,
            event_id=str(n),
            run_id="brave-otter-3f2a",
            version=n,
            type="AnomalyDetected",
            schema_version=1,
            occurred_at=n,
            recorded_at=n,
            attempt=1,
            actor="trainer",
            causation_id=None,
            event=spike,
        )
        for n in range(1, 11)
    ]
    output.console().print(history_table(recorded))
    shown = capsys.readouterr().out
    assert (shown.count("step 8: loss_spike"), "7 more of attempt 1: loss_spike" in shown) == (3, True)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stop", "`sftd pause RUN`"),
        ("kill", "`sftd cancel RUN --now`"),
        ("status", "`sftd ls`"),
        ("list", "`sftd ls`"),
        ("delete", "`sftd rm RUN`"),
        ("train", "`sftd submit CONFIG`"),
        ("log", "`sftd logs RUN`"),
        ("deamon", "Did you mean `sftd daemon`?"),
    ],
)
def test_what_people_try_is_answered(word: str, said: str) -> None:
    shown = CliRunner().invoke(main, [word, "brave-otter"])
    assert shown.exit_code == 2
    assert said in shown.output


@pytest.mark.parametrize("word", ["rename", "models", "evaluate", "merge", "undo"])
def test_another_word_is_not_taken_for_a_misspelt_command(word: str) -> None:
    assert "Did you mean" not in CliRunner().invoke(main, [word]).output


def test_hints_name_commands_that_there_are() -> None:
    assert not HINTS.keys() & COMMANDS.keys()
    named = {name for hint in HINTS.values() for name in re.findall(r"`sftd ([a-z]+)", hint)}
    assert named <= COMMANDS.keys()


def test_help_is_a_command_too() -> None:
    assert CliRunner().invoke(main, ["help"]).output == CliRunner().invoke(main, ["--help"]).output
    assert (
        CliRunner().invoke(main, ["help", "ls"]).output == CliRunner().invoke(main, ["ls", "--help"]).output
    )
    assert CliRunner().invoke(main, ["help", "db", "check"]).exit_code == 0
    assert CliRunner().invoke(main, ["help", "nope"]).exit_code == 2


READING = [
    "ls",
    "ls --json",
    "show r",
    "events r",
    "queue",
    "watch --once",
    "nodes",
    "compare a b",
    "cancel r",
    "gc",
    "logs r",
    "views rebuild",
    "mlflow check",
    "ui",
    "notify",
    "daemon --status",
    "daemon --stop",
]


@pytest.mark.parametrize("command", READING)
def test_a_home_that_does_not_exist_is_not_made(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "typo"
    monkeypatch.setenv("SFTD_HOME", str(home))
    shown = CliRunner().invoke(main, command.split())
    assert shown.exit_code == 1
    assert f"There is nothing at {home}: this folder does not exist" in shown.stderr
    assert "fix: correct SFTD_HOME" in shown.stderr
    assert not home.exists()


@pytest.mark.parametrize("command", ["init", "daemon", "import x", "doctor"])
def test_a_home_that_cannot_be_made_is_a_sentence(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTD_HOME", "/proc/none")
    shown = CliRunner().invoke(main, command.split())
    assert shown.exit_code == 1
    assert shown.stderr.startswith("sftd: SFTD_HOME=/proc/none cannot be made: No such file or directory")


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("prepare x -m m -o DIR/x.parquet", "--out"),
        ("prepare x -m m -o x.parquet --val-rows 1 --val-out DIR/v.parquet", "--val-out"),
    ],
)
def test_a_folder_to_write_into_that_is_missing_is_found_before_the_work(
    command: str, where: str, tmp_path: Path
) -> None:
    shown = CliRunner().invoke(main, command.replace("DIR", f"{tmp_path}/none").split())
    assert shown.exit_code == 2
    assert shown.stderr.startswith(
        f"refused: {where}: {tmp_path}/none does not exist\n    fix: make it: mkdir -p"
    )


def test_a_single_problem_takes_no_heading(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(Refused(Problem("brave-otter", "has succeeded already", "fork it")))
    assert capsys.readouterr().err == "refused: brave-otter: has succeeded already\n    fix: fork it\n"
    output.print_error(Refused([Problem("a", "x"), Problem("b", "y", "z")]))
    assert capsys.readouterr().err.startswith("refused: 2 problems; nothing was written\n  a: x\n  b: y\n")


def test_what_is_trained_is_shown_if_it_is_not_all() -> None:
    adapters, begun = Lora(rank=8, targets=["v", "q"]), Lora(rank=8, targets=["o"], adapter="/a")
    assert what_is_trained(Model()) == ""
    assert what_is_trained(Model(lora=adapters)) == "adapters of rank 8 for q, v"
    assert what_is_trained(Model(lora=begun)) == "adapters of rank 8 for o, from /a"
    assert what_is_trained(Model(lora=adapters, quantize="nf4")).endswith("v, beside weights in nf4")
    assert what_is_trained(Model(freeze=["^model.embed", "norm"])) == "all weights but ^model.embed, norm"
