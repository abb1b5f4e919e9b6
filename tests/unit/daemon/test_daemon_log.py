"""The daemon's own log: both formats, and how much of it is kept."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sftd.daemon import log
from sftd.settings import SettingsError, read


def record(run_id: str = "brave-otter-3f2a", attempt: int | None = 2) -> logging.LogRecord:
    """What `of_run` makes of a line."""
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger = logging.getLogger("sftd.daemon")
    logger.addHandler(handler)
    try:
        log.of_run(run_id, attempt).warning("two\nlines, %d %s", 5, "\N{SNOWMAN}")
    finally:
        logger.removeHandler(handler)
    [found] = seen
    return found


def test_a_line_names_its_run() -> None:
    line = log.TextFormat().format(record())
    assert line.endswith(" WARNING brave-otter-3f2a: two\n    lines, 5 \N{SNOWMAN}")


def test_a_message_can_do_nothing_to_a_terminal() -> None:
    said = "a path \x1b]0;x\x07\x9b2J\u202e and\na forged line"
    line = log.TextFormat().format(logging.LogRecord("sftd.daemon", logging.ERROR, "f", 1, said, (), None))
    assert line.endswith(r"a path \x1b]0;x\x07\x9b2J\u202e and" + "\n    a forged line")


def test_a_json_line_is_one_line_with_every_key() -> None:
    line = log.JsonFormat().format(record())
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "sftd.daemon",
        "run_id": "brave-otter-3f2a",
        "attempt": 2,
        "message": "two\nlines, 5 \N{SNOWMAN}",
        "exception": None,
    }


def test_what_is_about_no_run_has_the_same_keys() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        plain = logging.LogRecord("sftd.mirror", logging.INFO, "f", 1, "caught up", (), sys.exc_info())
    found = json.loads(log.JsonFormat().format(plain))
    assert (found["run_id"], found["attempt"], found["message"]) == (None, None, "caught up")
    assert found["exception"].endswith("ValueError: boom")
    assert " INFO    caught up" in log.TextFormat().format(plain)


def test_the_file_is_bounded_private_and_takes_the_output_along(tmp_path: Path) -> None:
    """In a process of its own, whose stdout and stderr it takes."""
    script = """
import logging, os, sys
from pathlib import Path
from sftd.daemon.log import PrivateFile
os.umask(0o022)
handler = PrivateFile(Path(sys.argv[1]), size=1000, kept=3, takes_output=True)
logging.getLogger("x").addHandler(handler)
for n in range(200):
    logging.getLogger("x").warning("line %d %s", n, "x" * 50)
os.write(2, b"a last word\\n")
"""
    path = tmp_path / "daemon.log"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["daemon.log", "daemon.log.1", "daemon.log.2", "daemon.log.3"]
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert all(f.stat().st_size <= 1000 + len("a last word\n") for f in files)
    lines = path.read_text().splitlines()
    assert lines[-2].startswith("line 199 ")
    assert lines[-1] == "a last word"


def test_warnings_are_lines_of_the_log(tmp_path: Path) -> None:
    script = (
        "import warnings; from sftd.daemon import log; log.set_up('json'); warnings.warn('odd', stacklevel=1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    [line] = done.stderr.splitlines()
    assert "odd" in json.loads(line)["message"]


def test_the_format_is_checked(tmp_path: Path) -> None:
    environ = {"SFTD_HOME": str(tmp_path)}
    assert read(environ).log_format == "text"
    assert read(environ | {"SFTD_LOG_FORMAT": "json"}).log_format == "json"
    with pytest.raises(SettingsError, match="neither text nor json"):
        read(environ | {"SFTD_LOG_FORMAT": "xml"})


def test_an_outage_is_told_once_and_then_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """A database that is away for a night must not rotate the log away."""
    caplog.set_level(logging.INFO, "sftd.daemon")
    now = 0.0
    outage = log.Outage("the database", lambda: now)
    outage.answered()
    for _ in range(4 * 3600):
        for reason in ("refused", "starting up"):
            outage.failed(reason)
        now += 0.5
    outage.answered()
    outage.answered()
    outage.failed("refused")
    said = [record.getMessage() for record in caplog.records]
    both = ["the database: refused; trying again", "the database: starting up; trying again"]
    assert said == [*both, *both, "the database answers again", both[0]]
