"""What leaves in a notice and how, where no database is needed."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sftd.daemon import worker
from sftd.domain import notices
from sftd.domain.log import codec
from sftd.domain.log import events as e
from sftd.projections.notices.channels import Command, NotSent, channels
from sftd.settings import SettingsError, read
from tests.builders import paths
from tests.builders.patience import PATIENCE

SECRET = "https://hooks.example.com/services/T0/hush-hush-9"
TRIAL = notices.trial(0, "ada")


def failed(message: str) -> notices.Notice:
    event = e.RunFailed(cause="crash", message=message)
    made = notices.notice(recorded(event), e.NoticeFacts("p", "", "ada", 1, 2, None))
    assert made is not None
    return made


GOLDEN: list[dict[str, Any]] = json.loads((paths.GOLDEN / "events.json").read_text())
# Kind and text of the notice of each event in the golden file.
SAID = {
    "RunSucceeded": (
        "ended",
        "succeeded: 40 steps, 20,000 tokens, loss 2.346; stopped early: val_loss has not improved on 1.25 (step 20) in 3 values",
    ),
    "RunCancelled": ("ended", "was cancelled by ada at step 1,234 of 5,000"),
    "RunFailed": (
        "failed",
        "failed at step 1,234 of 5,000: crash loop: 3 attempts in a row without a new checkpoint",
    ),
    "AnomalyDetected": ("anomaly", "anomaly at step 21: redone step differs from the log"),
    "ReplayDiverged": (
        "anomaly",
        "anomaly: step 27, recomputed by ada, differs from the log",
    ),
    "CheckpointRejected": (
        "anomaly",
        "anomaly: the checkpoint of step 20 was rejected: rank-0.pt: digest differs",
    ),
    "AttemptLaunched": ("started", "started on node1"),
    "EvaluationCompleted": (
        "metrics",
        "evaluation arithmetic of step 40: exact_match 0.51, exact_match_stderr 0.05 (100 questions)",
    ),
    "EvaluationFailed": (
        "failed",
        "evaluation arithmetic of step 40 failed: timeout: it did not end within 60 s",
    ),
    "AttemptFailed": (
        "retrying",
        "failed at step 1,234 of 5,000, and will be tried again: out of memory: rank 0: OutOfMemoryError",
    ),
    "AttemptLost": (
        "retrying",
        "was lost at step 1,234 of 5,000, and will be tried again: the host restarted",
    ),
    "AttemptPaused": ("paused", "was paused by ada at step 40"),
    "AttemptPreempted": (
        "paused",
        "was interrupted at step 40, and is queued again: Slurm ended job 12 at its time limit",
    ),
}


def test_every_event_with_a_notice_and_its_words() -> None:
    """All others give no notice. Neither does the last attempt of a failed run: the run has its own."""
    facts = e.NoticeFacts("a project", "a name", "ada", 1234, 5000, "2.3456")
    newest = {line["type"]: line for line in GOLDEN}
    assert newest.keys() == e.EVENT_TYPES.keys()
    for name, line in newest.items():
        event = codec.decode(name, line["v"], json.dumps(line["p"]))
        made = notices.notice(recorded(event, attempt=2), facts)
        if name not in SAID:
            assert made is None, name
            continue
        kind, said = SAID[name]
        assert made == notices.Notice(
            id="id",
            kind=kind,
            event=name,
            run_id="one",
            project="a project",
            name="a name",
            user="ada",
            attempt=2,
            step=1234,
            planned_steps=5000,
            at="2026-11-30T10:00:00+00:00",
            text=f"sftd: a name (one) {said}",
        )
        assert name in notices.event_types((kind,))
    for final in (e.AttemptFailed(cause="crash", message="m", exit_code=1), e.AttemptLost(message="m")):
        assert notices.notice(recorded(final), facts) is None
    many = notices.notice(recorded(e.AnomalyDetected(step=3, what="loss_spike")), facts, 100)
    assert many is not None
    assert many.text.endswith("anomaly at step 3: loss_spike (100 of this kind in this attempt)")


def recorded(event: e.Event, attempt: int | None = None) -> e.Recorded:
    return e.Recorded(
        position=1,
        event_id="id",
        run_id="one",
        version=1,
        type=type(event).__name__,
        schema_version=1,
        occurred_at=1_796_032_800_000_000,
        recorded_at=0,
        attempt=attempt,
        actor="t",
        causation_id=None,
        event=event,
    )


def test_last_words_that_no_variable_holds_are_told() -> None:
    made = failed("rank 0:\x00\x1b[31m dead")
    assert made.text == "sftd: one failed at step 1 of 2: crash: rank 0:  [31m dead"
    Command([sys.executable, "-c", "import os; assert 'dead' in os.environ['SFTD_NOTICE_TEXT']"]).send(made)


def test_machines_that_slurm_took_back_made_room_for_no_run() -> None:
    event = e.AttemptPreempted(step=5, by_run="", reason="Slurm took its machines back")
    assert event.notice(e.NoticeFacts("p", "", "ada", 5, 9, None)) == (
        "was interrupted at step 5, and is queued again: Slurm took its machines back"
    )


def test_a_run_that_is_tried_again_is_not_said_to_go_on_where_it_failed() -> None:
    facts = e.NoticeFacts("p", "", "ada", 95, 200, None)
    crash = e.AttemptFailed(cause="killed", message="by SIGKILL", exit_code=1, retry_at=1)
    # The next attempt continues from a checkpoint, which is that of a step before.
    assert crash.notice(facts) == "failed at step 95 of 200, and will be tried again: killed: by SIGKILL"
    lost = e.AttemptLost(message="the host is gone", retry_at=1)
    assert lost.notice(facts) == "was lost at step 95 of 200, and will be tried again: the host is gone"


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
    thread = worker.of_channel(notifier, first_backoff=3600)  # type: ignore[arg-type]
    thread.start()
    assert notifier.tried.wait(PATIENCE)
    thread.end()
    thread.stop(PATIENCE)
    assert notifier.tries == 2
    assert not thread._thread.is_alive()


def test_kinds_that_name_nothing_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"SFTD_NOTIFY_ON .*is empty"):
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
