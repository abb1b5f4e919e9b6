"""A terminal obeys no text of a name, a message or a path, whichever command prints it."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from sftd.cli import COMMANDS, main
from sftd.cli.terminal import border, output
from sftd.daemon.log import TextFormat
from sftd.domain.log import events as e
from sftd.domain.text.printable import escaped, harmless, printable
from sftd.store.queue import leases, order
from tests.builders.log.direct_folders import Folder
from tests.builders.log.histories import append, claimed, open_log, published, spec, step, submitted

# The window's title, clearing, hidden text, the same in one C1 character, text turned round, a line that overwrites another,
# markup of rich, a null.
EVIL = "q\x1b]0;t\x07\x1b[2J\x1b[8mh\x9b31m\x7f\u202egnp\u2066\u2028\r\x08[bold]m[/bold][link=file:/x]l[/link]\0e"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
OURS = re.compile(r"\x1b\[(?:0|1|2|22|3[0-7]|9[0-7])m")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Path:
    """A home with runs in whose every text somebody wrote something evil."""
    home = tmp_path_factory.mktemp("written") / "home"
    home.mkdir()
    shutil.copyfile(sqlite_template, home / "sftd.db")
    store = open_log(f"sqlite:///{home}/sftd.db")
    of = spec(name=EVIL)
    of = msgspec.structs.replace(
        of,
        model=msgspec.structs.replace(of.model, partial_pretrain=f"/no/{EVIL}"),
        data=msgspec.structs.replace(of.data, train_files=[f"/no/{EVIL}"]),
        trainer=msgspec.structs.replace(of.trainer, project_name=EVIL),
    )
    first = msgspec.structs.replace(submitted(of), user=EVIL, warnings=[EVIL])
    attempt = [evil(event) for event in claimed(**{EVIL: EVIL})]
    saved = evil(published(1), manifest_digest="m")
    joined = e.SweepJoined(sweep="sweep-evil", values={EVIL: EVIL})
    odd = e.AnomalyDetected(step=2, what=EVIL, detail={EVIL: EVIL})
    failed = e.AttemptFailed(cause="crash", message=EVIL, exit_code=1)
    ended = e.RunFailed(cause="crash", message=EVIL)
    sample = e.SampleGenerated(step=1, prompt=EVIL, text=EVIL, tokens=1, stopped=True)
    append(store, "bad-run-1", [first, joined, *attempt, step(1), sample, saved, odd, step(2), failed, ended])
    asked = [e.EvaluationRequested(name=name, step=1, by=EVIL) for name in ("done", EVIL)]
    done = e.EvaluationCompleted(
        name="done",
        step=1,
        kind=EVIL,
        metrics={EVIL: 1.0},
        questions=1,
        questions_digest=EVIL,
        manifest_digest="m",
        environment={EVIL: EVIL},
        seconds=1.0,
        answers=f"/no/{EVIL}",
    )
    lost = e.EvaluationFailed(name=EVIL, step=1, cause=EVIL, message=EVIL, will_retry=True)
    append(store, "bad-run-1", [*asked, done, lost])
    append(store, "bad-run-2", [first, joined])
    append(store, "bad-run-3", [first, joined, *attempt, step(1), evil(published(1), manifest_digest="m")])
    append(store, "bad-run-4", [first, e.RunHeld(by=EVIL, reason=EVIL)])
    fork = e.RunForked(
        parent="bad-run-1",
        step=1,
        sample=0,
        checkpoint=f"/no/{EVIL}",
        manifest_digest="m",
        bytes=1,
        tokens_total=10,
        changes={EVIL: [EVIL, EVIL], "optimizer.lr": [1, 2]},
        by=EVIL,
    )
    append(store, "bad-run-5", [fork, first])
    with store.write() as tx:
        for number in range(1, 6):
            leases.enqueue(tx, f"bad-run-{number}", 0, number)
            order.set_demand(tx, f"bad-run-{number}", of)
    logs = home / "runs" / "bad-run-1" / "attempt-0001"
    logs.mkdir(parents=True)
    (logs / "output.log").write_text(EVIL * 2 + "\n")
    store.engine.dispose()
    return home


@pytest.fixture
def log(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands find it."""
    shutil.copytree(written, tmp_path / "home")
    monkeypatch.setenv("SFTD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    direct = Folder(tmp_path / "direct")
    direct.attempt(evil(direct.published(1), manifest_digest="m"), error=EVIL, exit_code=1)
    (tmp_path / "evil.yaml").write_text(json.dumps({"data": {EVIL: EVIL}, EVIL: 1}), encoding="utf-8")


def evil(event: Any, **given: Any) -> Any:
    """The event with every text in it replaced."""
    texts = {name: EVIL for name in event.__struct_fields__ if isinstance(getattr(event, name), str)}
    return msgspec.structs.replace(event, **(texts | given))


# Per command, what is tried; a command that is not named is only asked for its help.
TRIED = {
    "ls": [
        "",
        "--columns name,project,sweep,values,user,message,metrics",
        "EVIL",
        "--sort name",
        "--json",
        "--since EVIL",
    ],
    "show": [
        "bad-run-1",
        "sweep-evil",
        "EVIL",
        "bad-run-1 --json",
        "sweep-evil --json",
        "bad-run-5",
        "bad-run-4",
    ],
    "watch": ["--once", "--json", "bad-run-3 --once", "EVIL"],
    "compare": ["sweep-evil", "bad-run-1 bad-run-5", "bad-run-1 EVIL", "sweep-evil --json"],
    "events": ["bad-run-1", "bad-run-1 --json", "bad-run-5", "bad-run-1 -t EVIL"],
    "replay": ["bad-run-1", "bad-run-5", "bad-run-1 --json", "bad-run-1 --until EVIL"],
    "verify": ["bad-run-1"],
    "data": ["bad-run-1 --step EVIL"],
    "logs": ["bad-run-1", "EVIL"],
    "checkpoints": ["bad-run-1", "bad-run-1 --json"],
    "resume": ["bad-run-1 EVIL=1", "bad-run-1 optimizer.lr=EVIL", "bad-run-1"],
    "fork": ["bad-run-1", "bad-run-1 --from-step 1", "bad-run-1 EVIL=EVIL"],
    "lineage": ["bad-run-5", "bad-run-5 --json", "sweep-evil"],
    "cancel": ["EVIL", "bad-run-3 --reason EVIL"],
    "queue": ["", "--json"],
    "hold": ["bad-run-2 --reason EVIL", "bad-run-1"],
    "release": ["bad-run-4"],
    "pause": ["bad-run-3 --reason EVIL"],
    "nodes": ["", "--json"],
    "submit": [
        "evil.yaml",
        "EVIL.yaml",
        "evil.yaml EVIL=EVIL",
        "evil.yaml --grid EVIL",
        "evil.yaml --after EVIL",
    ],
    "plan": ["evil.yaml", "EVIL.yaml"],
    "config": ["EVIL"],
    "generate": ["bad-run-1 -p x", "EVIL -p x"],
    "eval": [
        "bad-run-1 --list",
        "bad-run-1 --list --json",
        "bad-run-1 EVIL --against EVIL",
        "bad-run-1 EVIL --against 1",
        "bad-run-1 --cancel",
        "bad-run-1 EVIL",
    ],
    "export": ["bad-run-1 EVIL", "bad-run-1 no-such/EVIL"],
    "gc": ["--dry-run", "EVIL"],
    "rm": ["EVIL", "bad-run-1", "bad-run-1 --yes"],
    "import": ["EVIL", "EVIL --EVIL", "direct", "direct --json"],
    "notify": ["EVIL"],
    "prepare": ["EVIL -m EVIL -o no-such/EVIL"],
    "ui": ["EVIL"],
    "mlflow": ["check EVIL", "register bad-run-1 EVIL", "EVIL"],
    "db": ["check", "EVIL"],
    "views": ["rebuild", "EVIL"],
    "init": ["EVIL"],
    "completion": ["EVIL"],
    "EVIL": [""],
}
LINES = [(name, line) for name, lines in TRIED.items() for line in lines]


@pytest.mark.parametrize("is_terminal", [False, True], ids=["piped", "terminal"])
@pytest.mark.parametrize(("name", "line"), LINES, ids=lambda part: part or "plain")
def test_a_terminal_obeys_nothing_that_is_printed(
    log: None, name: str, line: str, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda: is_terminal)
    # No argument of a process has a null in it.
    arguments = [word.replace("EVIL", EVIL.rstrip("e").rstrip("\0")) for word in (name, *line.split())]
    shown = CliRunner().invoke(main, arguments, color=is_terminal)
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    text = OURS.sub("", shown.output) if is_terminal else shown.output
    assert OBEYED.findall(text.replace("\n", "").replace("\t", "")) == []
    assert shown.output
    if "--json" in line:
        for written in shown.stdout.splitlines():
            json.loads(written)


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def test_a_spinner_moves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Screen(), Screen()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with border.guarded(), output.console(stderr=True).status("looking"):
        print(f"{EVIL} printed")
        output.note(f"{EVIL} noted")
        output.warn(f"{EVIL} warned")
    assert "looking\r\x1b[2K" in err.getvalue(), "a frame stays on the screen"
    # Rich's own: it hides the cursor, goes up and erases lines.
    moved = re.compile(r"\x1b\[(?:\?25[lh]|1A|2K)|\r")
    for stream, said in ((out, ()), (err, ("noted", "warned", "printed"))):
        text = OURS.sub("", moved.sub("", stream.getvalue()))
        assert OBEYED.findall(text) == []
        assert all(word in text for word in said)


def test_json_keeps_what_it_says(log: None) -> None:
    rows = json.loads(CliRunner().invoke(main, ["ls", "--json", "bad-run-1"]).stdout)
    assert (rows[0]["name"], rows[0]["project"]) == (EVIL, EVIL)


def test_every_command_is_tried() -> None:
    # The others talk to people about nothing that is stored.
    assert set(COMMANDS) - set(TRIED) == {"demo", "daemon", "doctor"}


def test_halves_of_characters_are_no_traceback(log: None) -> None:
    shown = CliRunner().invoke(main, ["show", "\udcff"])
    assert shown.exit_code == 2
    assert "There is no run" in shown.stderr


def test_a_line_of_the_daemons_log_is_harmless() -> None:
    import logging

    record = logging.LogRecord("sftd.daemon", logging.INFO, "f", 1, "%s", (EVIL,), None)
    assert OBEYED.findall(TextFormat().format(record)) == []


def test_what_people_write_with_is_left_alone() -> None:
    # A family of joined characters, Persian with a non-joiner, a French space, our colours.
    text = "👨\u200d👩\u200d👧 می\u200cخواهم 5\u00a0% \x1b[1;32mok\x1b[0m\n\ta"
    assert harmless(text) == text
    assert printable("one\ntwo\x1b") == "one two "
    assert json.loads(escaped(json.dumps(EVIL, ensure_ascii=False))) == EVIL
    assert json.loads(escaped('"\U000e0041"')) == "\U000e0041"
    assert "\U000e0041" not in escaped('"\U000e0041"')
