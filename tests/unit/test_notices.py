"""What leaves in a notice and how, where no database is needed."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sftd.daemon.notices import NoticeThread
from sftd.domain import events as e
from sftd.domain import notices
from sftd.projections.notify_channels import Command, NotSent, channels
from sftd.settings import SettingsError, read
from tests.patience import PATIENCE

SECRET = "https://hooks.example.com/services/T0/hush-hush-9"
TRIAL = notices.trial(0, "ada")


def failed(message: str) -> notices.Notice:
    event = e.RunFailed(cause="crash", message=message)
    recorded = e.Recorded(
        position=1,
        event_id="id",
        run_id="one",
        version=1,
        type="RunFailed",
        schema_version=1,
        occurred_at=0,
        recorded_at=0,
        attempt=None,
        actor="t",
        causation_id=None,
        event=event,
    )
    made = notices.notice(recorded, notices.Facts("p", "", "ada", 1, 2, None))
    assert made is not None
    return made


def test_last_words_that_no_variable_holds_are_told() -> None:
    made = failed("rank 0:\x00\x1b[31m dead")
    assert made.text == "sftd: one failed at step 1 of 2: crash: rank 0:  [31m dead"
    Command([sys.executable, "-c", "import os; assert 'dead' in os.environ['SFTD_NOTICE_TEXT']"]).send(made)


def test_machines_that_slurm_took_back_made_room_for_no_run() -> None:
    event = e.AttemptPreempted(step=5, by_run="", reason="Slurm took its machines back")
    assert notices._said(event, notices.Facts("p", "", "ada", 5, 9, None)) == (
        "was interrupted at step 5, and is queued again: Slurm took its machines back"
    )


def test_a_run_that_is_tried_again_is_not_said_to_go_on_where_it_failed() -> None:
    facts = notices.Facts("p", "", "ada", 95, 200, None)
    crash = e.AttemptFailed(cause="killed", message="by SIGKILL", exit_code=1, retry_at=1)
    # The next attempt goes on from a checkpoint, which is that of a step before.
    assert (
        notices._said(crash, facts) == "failed at step 95 of 200, and will be tried again: killed: by SIGKILL"
    )
    lost = e.AttemptLost(message="the host is gone", retry_at=1)
    assert (
        notices._said(lost, facts) == "was lost at step 95 of 200, and will be tried again: the host is gone"
    )


@pytest.mark.parametrize("where", ["one argument", "a line for a shell", "where little is told"])
def test_a_command_that_tells_its_arguments_tells_the_log_nothing(where: str, tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(
        "import sys\n"
        "sys.stderr.write('--2026--  ' + sys.argv[1] + '\\n404: Not Found' + 'x' * int(sys.argv[2]))\n"
        "sys.exit(8)\n"
    )
    padding = "270" if where == "where little is told" else "0"
    argument = f"wget '{SECRET}' -O -" if where == "a line for a shell" else SECRET
    with pytest.raises(NotSent, match=r"exit code 8: .*404: Not Found") as refused:
        Command([sys.executable, str(script), argument, padding]).send(TRIAL)
    assert not any(part in str(refused.value) for part in ("hush", "hooks.example", "T0"))


def test_a_command_runs_in_the_same_folder_whoever_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `sftd notify --test` would find ./tell.sh where the daemon does not."""
    monkeypatch.chdir("/")
    script = tmp_path / "tell.sh"
    script.write_text("#!/bin/sh\npwd > told\n")
    script.chmod(0o700)
    (command,) = channels("./tell.sh", "", tmp_path)
    command.send(TRIAL)
    assert (tmp_path / "told").read_text().strip() == os.path.realpath(tmp_path)


def test_what_failed_is_tried_once_more_before_the_daemon_ends() -> None:
    class Notifier:
        channel = Command(["true"])
        tries = 0
        tried = threading.Event()

        def begin(self) -> None:
            """Nothing to begin."""

        def sync(self, _: Any) -> int:
            self.tries += 1
            self.tried.set()
            raise NotSent("down")

    notifier = Notifier()
    thread = NoticeThread(notifier, first_backoff=3600)  # type: ignore[arg-type]
    thread.start()
    assert notifier.tried.wait(PATIENCE)
    thread.stop()
    assert notifier.tries == 2
    assert not thread._thread.is_alive()


def test_kinds_that_name_nothing_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"SFTD_NOTIFY_ON .*names nothing"):
        read({"SFTD_HOME": "/nowhere", "SFTD_NOTIFY_ON": " , "})
    assert len({kind[0] for kind in notices.KINDS}) == len(notices.KINDS), "a channel's name has the letters"


def test_of_many_anomalies_the_first_tenth_and_hundredth_are_told() -> None:
    assert [n for n in range(1, 1001) if notices.is_told(n)] == [1, 10, 100, 1000]


def test_a_notice_has_the_first_line_of_a_message_and_300_characters_of_it() -> None:
    def text(message: str) -> str:
        return failed(message).text

    assert text(" one\ntwo").endswith(": crash: one")
    assert text("x" * 300).endswith("x" * 300)
    assert text("x" * 301).endswith(f"{'x' * 300}…")
    assert text("m") == "sftd: one failed at step 1 of 2: crash: m"
