"""What a person has in a terminal: the live board in a pseudo-terminal, logs that are followed, names that complete."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.cells import cell_len

from sftd.store.database.engine import Store
from sftd.wire.attempt.directory import AttemptDir, RunDir
from tests.builders.log.histories import FAILED, SUCCEEDED, append, claimed, open_log, spec, step, submitted
from tests.builders.patience import PATIENCE

RUN = "brave-otter-3f2a"
# The last one may not have been read to its end.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?]*(?:[a-zA-Z]|$)|\].*?\x07|[()][A-Z0-9]|[=>]|$)")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SFTD_", "MLFLOW_", "COLUMNS", "LINES"))}
    return kept | {
        "SFTD_HOME": str(home),
        "MLFLOW_TRACKING_URI": "",
        "TERM": "xterm-256color",
        "LC_ALL": "C.UTF-8",
        # Whatever this user's keys do.
        "INPUTRC": os.devnull,
    }


@pytest.fixture
def log(home: Path, sqlite_template: Path) -> Iterator[Store]:
    (home / "sftd.db").write_bytes(sqlite_template.read_bytes())
    store = open_log(f"sqlite:///{home / 'sftd.db'}")
    yield store
    store.engine.dispose()


class Terminal:
    """A program in a pseudo-terminal, and what it has written."""

    def __init__(self, argv: list[str], env: dict[str, str], columns: int = 80, lines: int = 24) -> None:
        self._fd, inside = pty.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            argv, stdin=inside, stdout=inside, stderr=inside, env=env, start_new_session=True
        )
        self._inside = inside
        # What is read may end in the middle of a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.written = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, is_there: Callable[[str], bool], seconds: float = PATIENCE) -> str:
        """Read until what was written since the last call satisfies a condition; it is returned."""
        until = time.monotonic() + seconds
        while not is_there(self.written):
            left = until - time.monotonic()
            assert left > 0, f"not within {seconds} s:\n{self.written}"
            if select.select([self._fd], [], [], min(left, 1.0))[0]:
                self.written += self._decoder.decode(os.read(self._fd, 1 << 16))
            else:
                assert self.process.poll() is None, self.written
        found, self.written = self.written, ""
        return found

    def mode(self) -> list[Any]:
        """How keys are read."""
        return termios.tcgetattr(self._inside)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=60)
        os.close(self._inside)
        os.close(self._fd)


@pytest.fixture
def start(env: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []
    # A test run in the background ignores it, and programs inherit that; those of a terminal do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(argv: list[str], **size: int) -> Terminal:
        opened.append(Terminal(argv, env, **size))
        return opened[-1]

    yield begin
    signal.signal(signal.SIGINT, before)
    for terminal in opened:
        terminal.close()


def screen(written: str) -> list[str]:
    """The lines of what was written, without what is not text."""
    # Each screen begins at the top left.
    text = _SEQUENCE.sub("", written.replace("\x1b[H", "\n"))
    return [line.strip("\r") for line in text.split("\n")]


def test_a_board_lives_in_a_terminal(log: Store, home: Path, start: Callable[..., Terminal]) -> None:
    append(log, RUN, [submitted(spec(steps=50)), *claimed(), *(step(n, 5.0 / n) for n in range(1, 11))])
    terminal = start([sys.executable, "-m", "sftd", "watch", RUN])
    before = terminal.mode()
    first = terminal.wait_for(lambda text: "10/50" in text and "events" in text)
    assert "\x1b[?1049h" in first, "the board has a screen of its own"
    assert all(cell_len(line) <= 80 for line in screen(first))
    assert terminal.mode() != before, "keys are read one by one"

    append(log, RUN, [step(11, 0.25)])
    changed = terminal.wait_for(lambda text: "11/50" in text and "0.2500" in text)
    # What is painted over is not wiped first: that flickers.
    assert "\x1b[2J" not in changed

    terminal.resize(140, 40)
    wide = terminal.wait_for(lambda text: any(100 < cell_len(line) <= 140 for line in screen(text)))
    assert all(cell_len(line) <= 140 for line in screen(wide))

    (home / "sftd.db").rename(home / "away.db")
    terminal.wait_for(lambda text: "cannot observe since" in text and "is gone" in text)
    (home / "away.db").rename(home / "sftd.db")
    append(log, RUN, [step(12, 0.125)])
    back = terminal.wait_for(lambda text: "12/50" in text)
    assert "cannot observe" not in back[back.index("12/50") :]

    terminal.press("x")
    terminal.press("q")
    end = terminal.wait_for(lambda text: "\x1b[?1049l" in text)
    assert "Traceback" not in end
    assert terminal.process.wait(timeout=PATIENCE) == 0
    assert terminal.mode() == before


def test_control_c_ends_a_board_and_a_dumb_terminal_has_one_board(
    log: Store, start: Callable[..., Terminal], env: dict[str, str]
) -> None:
    append(log, RUN, [submitted(spec(steps=50))])
    # Ctrl-C, `kill` or `timeout`, and a connection that breaks.
    ends = ((signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP))
    for number, code in ends:
        terminal = start([sys.executable, "-m", "sftd", "watch"])
        before = terminal.mode()
        terminal.wait_for(lambda text: "nothing runs" in text)
        os.killpg(terminal.process.pid, number)
        terminal.wait_for(lambda text: "\x1b[?25h\x1b[?1049l" in text)
        assert terminal.process.wait(timeout=PATIENCE) == code
        assert terminal.mode() == before
    env["TERM"] = "dumb"
    once = start([sys.executable, "-m", "sftd", "watch"])
    assert "\x1b" not in once.wait_for(lambda text: "RunSubmitted" in text)
    assert once.process.wait(timeout=PATIENCE) == 0


# Makes the terminal of its keys the one that controls it, as a login does: without that a shell has no jobs.
_LOGIN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


def test_a_board_that_is_stopped_gives_the_terminal_back(
    log: Store, start: Callable[..., Terminal], env: dict[str, str]
) -> None:
    append(log, RUN, [submitted(spec(steps=50)), *claimed(), *(step(n, 5.0 / n) for n in range(1, 11))])
    env |= {"PS1": "ready> ", "PYTHONPATH": os.pathsep.join(sys.path), "HISTFILE": ""}
    shell = start([sys.executable, "-c", _LOGIN, "bash", "--norc", "--noprofile", "-i"])
    shell.wait_for(lambda text: "ready> " in text)
    shell.press(f"{sys.executable} -m sftd watch {RUN}\n")
    shell.wait_for(lambda text: "10/50" in text and "events" in text)
    own = shell.mode()

    # Control-Z: the shell has the terminal, with its cursor.
    shell.press("\x1a")
    left = shell.wait_for(lambda text: "Stopped" in text and "ready> " in text)
    assert left.index("\x1b[?25h\x1b[?1049l") < left.index("Stopped")
    [board] = psutil.Process(shell.process.pid).children()
    assert board.status() == psutil.STATUS_STOPPED
    # In the background it continues, and writes nothing.
    shell.press("bg\n")
    shell.wait_for(lambda text: "&" in text and "ready> " in text)
    shell.press("fg\n")
    again = shell.wait_for(lambda text: "10/50" in text and "events" in text)
    assert "\x1b[?1049h" in again
    assert "\x1b[?25l" in again
    assert shell.mode() == own

    # It does not see SIGSTOP, and others have written since.
    board.send_signal(signal.SIGSTOP)
    shell.wait_for(lambda text: "Stopped" in text and "ready> " in text)
    shell.press("fg\n")
    shell.wait_for(lambda text: "\x1b[?1049h" in text and "10/50" in text and "events" in text)

    # Another size is seen at once, though nothing in the log has changed.
    shell.resize(140, 40)
    shell.wait_for(lambda text: any(100 < cell_len(line) <= 140 for line in screen(text)))

    board.send_signal(signal.SIGHUP)
    ended = shell.wait_for(lambda text: "ready> " in text)
    assert "\x1b[?25h\x1b[?1049l" in ended
    shell.press("echo code-$?\n")
    shell.wait_for(lambda text: "code-129" in text)


def _shows(whole: str, written: str) -> bool:
    return whole in _SEQUENCE.sub("", written)


@pytest.fixture
def named(log: Store, env: dict[str, str], tmp_path: Path) -> None:
    """Three runs, and `sftd` on the path."""
    for run in (RUN, "brave-lynx-0001", "calm-fox-1b2c"):
        append(log, run, [submitted(spec())])
    program = tmp_path / "bin" / "sftd"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom sftd.cli import main\nmain()\n")
    program.chmod(0o700)
    env |= {
        "PATH": f"{program.parent}:{env['PATH']}",
        "PS1": "ready> ",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def needs(shell: str) -> Any:
    return pytest.mark.skipif(
        shutil.which(shell) is None, reason=f"COMPLETION IN {shell} IS NOT TESTED: install Debian's {shell}"
    )


@pytest.mark.parametrize(
    ("argv", "first"),
    [
        pytest.param(["bash", "--norc", "--noprofile", "-i"], "", id="bash"),
        # `-D` keeps no file in the home folder.
        pytest.param(
            ["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; ", id="zsh", marks=needs("zsh")
        ),
    ],
)
def test_names_of_runs_complete_at_the_tab(
    named: None, start: Callable[..., Terminal], argv: list[str], first: str
) -> None:
    shell = start(argv)
    shell.press(f'{first}eval "$(sftd completion {argv[0]})" && echo evalu""ated\n')
    shell.wait_for(lambda text: "evaluated" in text)
    for typed, whole in (
        ("sftd show calm\t", "sftd show calm-fox-1b2c "),
        ("sftd compare calm-fox-1b2c brave-o\t", f"sftd compare calm-fox-1b2c {RUN} "),
        ("sftd submit --after brave-l\t", "sftd submit --after brave-lynx-0001 "),
        ("sftd submit --after=brave-l\t", "sftd submit --after=brave-lynx-0001 "),
        ("sftd compl\t", "sftd completion "),
    ):
        shell.press(typed)
        shell.wait_for(partial(_shows, whole))
        # Control-U: the line is not wanted.
        shell.press("\x15")


@needs("fish")
def test_names_of_runs_complete_in_fish(named: None, env: dict[str, str], tmp_path: Path) -> None:
    asked = {
        "sftd show brave": ["brave-lynx-0001\tqueued", f"{RUN}\tqueued"],
        "sftd compare calm-fox-1b2c brave-o": [f"{RUN}\tqueued"],
        "sftd submit --after=brave-l": ["--after=brave-lynx-0001\tqueued"],
        "sftd completion f": ["fish"],
    }
    lines = ["sftd completion fish | source", *(f"complete -C '{typed}'; echo" for typed in asked)]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(lines)],
        env=env | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    said = iter(done.stdout.splitlines())
    found = {typed: sorted(iter(partial(next, said), "")) for typed in asked}
    assert found == {typed: sorted(whole) for typed, whole in asked.items()}


def test_completing_a_name_starts_light(log: Store, env: dict[str, str]) -> None:
    append(log, RUN, [submitted(spec())])
    script = (
        "import sys; from sftd.cli import main\n"
        "try: main(prog_name='sftd')\n"
        "except SystemExit: pass\n"
        "print([m for m in ('sqlalchemy', 'rich', 'psycopg') if m in sys.modules])"
    )
    asked = {"_SFTD_COMPLETE": "bash_complete", "COMP_WORDS": "sftd show br", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"plain,{RUN}", "[]"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str, env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sftd", "completion", shell],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_SFTD_COMPLETE={shell}_complete" in done.stdout


class Followed:
    """`sftd logs -f` in a process of its own."""

    def __init__(self, env: dict[str, str], *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sftd", "logs", "-f", RUN, *options],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )

    def next(self, count: int) -> list[str]:
        assert self._process.stdout is not None
        return [self._process.stdout.readline().rstrip("\n") for _ in range(count)]

    def rest(self) -> list[str]:
        out, _ = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0
        return out.splitlines()


def write(directory: AttemptDir, rank: int, text: str) -> None:
    path = directory.ranks_dir / "x" / "attempt_0" / str(rank) / "stderr.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(text)


def test_logs_follow_every_rank_across_restarts(log: Store, home: Path, env: dict[str, str]) -> None:
    append(log, RUN, [submitted(spec()), *claimed()])
    first, second = (RunDir(home, RUN).attempt(n) for n in (1, 2))
    write(first, 0, "zero begins\n")
    followed, of_one = Followed(env), Followed(env, "--rank", "1")
    model = "model: a, 0.0 M parameters, float32 on cpu, 1.0 s"
    assert followed.next(2) == [f"[attempt 1] {model}", "[attempt 1 · rank 0] zero begins"]
    append(log, RUN, [step(1), step(2)])
    steps = [line.partition("  loss ")[0] for line in followed.next(2)]
    assert steps == ["[attempt 1] step  1/10", "[attempt 1] step  2/10"]
    write(first, 1, "one begins\nhalf a ")
    assert followed.next(1) == ["[attempt 1 · rank 1] one begins"]
    write(first, 1, "line\nthe last words")
    assert followed.next(1) == ["[attempt 1 · rank 1] half a line"]
    first.output_log.write_text("torchrun gives up\n")
    assert followed.next(1) == ["[attempt 1] torchrun gives up"]
    append(log, RUN, [FAILED])
    write(second, 0, "again\n")
    append(log, RUN, claimed(), attempt=2)
    assert followed.next(3) == [
        "[attempt 1 · rank 1] the last words",
        f"[attempt 2] {model}",
        "[attempt 2 · rank 0] again",
    ]
    write(second, 0, "done")
    write(second, 1, "and one")
    append(log, RUN, [SUCCEEDED], attempt=2)
    assert followed.rest() == ["[attempt 2 · rank 0] done", "[attempt 2 · rank 1] and one"]
    assert of_one.rest() == [
        "[attempt 1 · rank 1] one begins",
        "[attempt 1 · rank 1] half a line",
        "[attempt 1 · rank 1] the last words",
        "[attempt 2 · rank 1] and one",
    ]
    tail = Followed(env, "--tail", "1")
    assert tail.rest() == [
        f"[attempt 2] {model}",
        "[attempt 2 · rank 0] done",
        "[attempt 2 · rank 1] and one",
    ]
