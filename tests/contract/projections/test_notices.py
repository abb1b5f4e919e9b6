"""Notices arrive: in order, at least once, from one daemon at a time, at a real HTTP server and by a real command."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sftd import settings as settings_module
from sftd.cli import main
from sftd.cli.daemon.systemd import unit
from sftd.daemon import worker
from sftd.daemon.loop import Daemon
from sftd.domain import notices
from sftd.domain.log import events as e
from sftd.launcher.command import environment
from sftd.launcher.inventory import Inventory
from sftd.projections import views
from sftd.projections.notices.channels import Channel, Command, NotSent, Webhook
from sftd.projections.notices.notifier import Notifier
from sftd.projections.verify import check_log
from sftd.store.database.engine import Store
from sftd.store.log import event_store
from tests.builders.log.histories import spec, submitted
from tests.builders.patience import PATIENCE, never

SECRET = "hush-hush-9"


class Hook:
    """A receiver of webhooks. `answers` are the status codes of the next requests, then 200; `hold` keeps them waiting."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.arrived = threading.Semaphore(0)
        self.hold = threading.Event()
        self.hold.set()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["Content-Type"] == "application/json"
                hook.arrived.release()
                hook.hold.wait(PATIENCE)
                status = hook.answers.pop(0) if hook.answers else 200
                if status == 200:
                    hook.bodies.append(body)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", self.path)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/{SECRET}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def texts(self) -> list[str]:
        return [body["text"] for body in self.bodies]

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.close()


class Log:
    """A log to append to, and a clock that is set by hand."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = 1_000_000_000
        store.before_commit = (views.catch_up,)
        store.clock = lambda _, local: local

    def add(self, run_id: str, *told: e.Event, attempt: int | None = 1, age: int = 0) -> None:
        with self.store.write() as tx:
            version = len(event_store.event_types(tx.connection, run_id))
            new = [
                e.NewEvent(
                    event=event,
                    event_id=str(uuid.uuid4()),
                    occurred_at=self.now - age,
                    actor="t",
                    attempt=attempt,
                )
                for event in told
            ]
            event_store.append(tx, run_id, version, new, self.now)

    def notifier(self, channel: Channel, kinds: tuple[str, ...] = ("ended", "failed", "anomaly")) -> Notifier:
        return Notifier(self.store, channel, kinds, lambda: self.now)


@pytest.fixture
def log(store: Store) -> Log:
    return Log(store)


FAILED = e.RunFailed(cause="out of memory", message="rank 0: no memory is left\nmore")
CANCELLED = e.RunCancelled(by="ada")
SPEC = spec(steps=4)
THREE_DAYS = 3 * 24 * 3600 * 1_000_000
ODD = e.AnomalyDetected(step=3, what="loss_spike")


def test_notices_arrive_in_order_and_once_across_restarts(log: Log, hook: Hook) -> None:
    log.add("past", submitted(SPEC), CANCELLED)
    log.notifier(Webhook(hook.url)).begin()
    log.add("one", submitted(SPEC), ODD, FAILED)
    log.add("two", submitted(SPEC))
    first = log.notifier(Webhook(hook.url))
    first.begin()  # known already: it continues where it is
    assert (first.sync(never), first.sync(never)) == (2, 0)
    log.add("two", e.RunSucceeded(steps=4, tokens=4000, final_checkpoint="c"))
    again = log.notifier(Webhook(hook.url))
    assert again.pending_count() == 1
    assert (again.sync(never), again.sync(never), again.pending_count()) == (1, 0, 0)
    assert hook.texts() == [
        "sftd: one anomaly at step 3: loss_spike",
        "sftd: one failed at step 0 of 4: out of memory: rank 0: no memory is left",
        "sftd: two succeeded: 4 steps, 4,000 tokens",
    ]
    assert hook.bodies[1]["kind"] == "failed"
    assert hook.bodies[1]["run_id"] == "one"
    assert hook.bodies[1]["at"] == "1970-01-01T00:16:40+00:00"


def test_only_what_was_asked_for_is_told(log: Log, hook: Hook) -> None:
    told = log.notifier(Webhook(hook.url), ("paused", "retrying"))
    told.begin()
    lost = e.AttemptLost(message="gone", retry_at=5)
    log.add(
        "one", submitted(SPEC), ODD, lost, e.AttemptLost(message="gone"), e.AttemptPaused(step=2, by="ada")
    )
    assert told.sync(never) == 2
    assert hook.texts() == [
        "sftd: one was lost at step 0 of 4, and will be tried again: gone",
        "sftd: one was paused by ada at step 2",
    ]


def test_other_kinds_begin_now_and_take_nothing_from_each_other(log: Log, hook: Hook) -> None:
    failures = log.notifier(Webhook(hook.url), ("failed",))
    failures.begin()
    log.add("one", submitted(SPEC), CANCELLED)
    ends = log.notifier(Webhook(hook.url), ("ended",))
    ends.begin()
    log.add("two", submitted(SPEC), CANCELLED)
    log.add("three", submitted(SPEC), FAILED)
    assert (failures.sync(never), ends.sync(never)) == (1, 1)
    assert [body["run_id"] for body in hook.bodies] == ["three", "two"]


def test_every_kind_is_a_setting_and_has_words() -> None:
    assert settings_module.NOTIFY_KINDS == notices.KINDS
    assert [n for n in range(1, 2000) if notices.is_told(n)] == [1, 10, 100, 1000]


@pytest.mark.parametrize("answer", [500, 404, 302])
def test_what_did_not_arrive_is_sent_again_before_what_follows(log: Log, hook: Hook, answer: int) -> None:
    told = log.notifier(Webhook(hook.url))
    told.begin()
    log.add("one", submitted(SPEC), FAILED)
    log.add("two", submitted(SPEC), CANCELLED)
    hook.answers = [answer]
    with pytest.raises(NotSent, match=f"the answer is {answer}"):
        told.sync(never)
    assert log.notifier(Webhook(hook.url)).sync(never) == 2
    assert [body["run_id"] for body in hook.bodies] == ["one", "two"]


def test_what_is_refused_or_too_old_is_given_up_with_a_line(
    log: Log, hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    told = log.notifier(Webhook(hook.url))
    told.begin()
    log.add("old", submitted(SPEC), FAILED, age=THREE_DAYS + 1)
    log.add("one", submitted(SPEC), FAILED)
    log.add("two", submitted(SPEC), CANCELLED, age=THREE_DAYS)
    hook.answers = [400]
    with caplog.at_level(logging.INFO, "sftd.notify"):
        assert told.sync(never) == 1
    assert [body["run_id"] for body in hook.bodies] == ["two"]
    lines = [record.getMessage() for record in caplog.records]
    assert ("too old to be sent: sftd: old failed" in lines[0], len(lines)) == (True, 2)
    assert "the answer is 400 Bad Request; not sent: sftd: one failed" in lines[1]
    assert SECRET not in caplog.text


def test_many_anomalies_of_a_kind_are_few_notices_whoever_counts(log: Log, hook: Hook) -> None:
    log.notifier(Webhook(hook.url)).begin()
    log.add("one", submitted(SPEC), *[ODD] * 7)
    told = log.notifier(Webhook(hook.url))
    told.sync(never)
    log.add("one", *[ODD] * 3)
    log.add("one", *[ODD] * 50, e.AnomalyDetected(step=9, what="other"))
    told.sync(never)
    log.add("one", *[ODD] * 45)
    log.notifier(Webhook(hook.url)).sync(never)
    log.add("one", ODD, attempt=2)
    told.sync(never)
    # A restarted daemon counts the others, and does not take them for this one.
    log.add("one", e.AnomalyDetected(step=9, what="a third"))
    log.notifier(Webhook(hook.url)).sync(never)
    what = "sftd: one anomaly at step 3: loss_spike"
    counted = [f"{what} ({n} of this kind in this attempt)" for n in (10, 100)]
    others = [f"sftd: one anomaly at step 9: {name}" for name in ("other", "a third")]
    assert hook.texts() == [what, counted[0], others[0], counted[1], what, others[1]]


def test_several_daemons_send_each_notice_once(log: Log, hook: Hook) -> None:
    mine, theirs = log.notifier(Webhook(hook.url)), log.notifier(Webhook(hook.url))
    mine.begin()
    log.add("one", submitted(SPEC), FAILED)
    log.add("two", submitted(SPEC), CANCELLED)
    hook.hold.clear()
    sending = threading.Thread(target=mine.sync, args=(never,))
    sending.start()
    assert hook.arrived.acquire(timeout=PATIENCE)
    # While the one sends, the other has nothing to do; nor has it afterwards.
    assert theirs.sync(never) == 0
    hook.hold.set()
    sending.join(PATIENCE)
    assert theirs.sync(never) == 0
    assert [body["run_id"] for body in hook.bodies] == ["one", "two"]


def test_a_daemon_that_died_while_it_sent_is_followed_by_another(
    log: Log, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(*_: Any) -> bool:
        raise Died

    dead, other = log.notifier(Webhook(hook.url)), log.notifier(Webhook(hook.url))
    dead.begin()
    log.add("one", submitted(SPEC), FAILED)
    # Killed when the notice has arrived, before it is written down.
    monkeypatch.setattr(dead, "_move", die)
    monkeypatch.setattr(dead, "_release", die)
    with pytest.raises(Died):
        dead.sync(never)
    assert other.sync(never) == 0
    # What it has left is nothing that `sftd db check` takes for a place in the log.
    assert not [p for p in check_log(log.store, lambda *_: None).problems if p.startswith("projection")]
    log.now += 61_000_000
    assert other.sync(never) == 1
    assert [body["id"] for body in hook.bodies] == [hook.bodies[0]["id"]] * 2


def test_one_that_was_too_slow_does_not_move_the_position_of_its_successor(
    log: Log, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Webhook(hook.url)
    slow, other = log.notifier(channel), log.notifier(Webhook(hook.url))
    slow.begin()
    log.add("one", submitted(SPEC), FAILED)
    log.add("two", submitted(SPEC), CANCELLED)
    send = channel.send

    def send_slowly(notice: notices.Notice) -> None:
        send(notice)
        log.now += 61_000_000
        assert other.sync(never) == 2

    monkeypatch.setattr(channel, "send", send_slowly)
    assert slow.sync(never) == 1
    assert [body["run_id"] for body in hook.bodies] == ["one", "one", "two"]
    assert log.notifier(Webhook(hook.url)).pending_count() == 0


def test_a_sender_whose_lease_another_took_and_lost_stops(log: Log, hook: Hook) -> None:
    slow, other = log.notifier(Webhook(hook.url)), log.notifier(Webhook(hook.url))
    slow.begin()
    log.add("one", submitted(SPEC), FAILED)
    log.add("two", submitted(SPEC), CANCELLED)
    asked = 0

    def other_sends() -> bool:
        """Between the first notice and the second, the lease expires."""
        nonlocal asked
        asked += 1
        if asked == 3:
            log.now += 61_000_000
            assert other.sync(never) == 1
            slow._renew_at = 0.0
        return False

    assert slow.sync(other_sends) == 1
    assert [body["run_id"] for body in hook.bodies] == ["one", "two"]


def test_a_command_is_told_on_its_input_and_by_variables(log: Log, tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(
        "import os, sys\n"
        f"open({str(tmp_path / 'told')!r}, 'a').write(os.environ['SFTD_NOTICE_KIND'] + ' ' + sys.stdin.read())\n"
    )
    told = log.notifier(Command([sys.executable, str(script), SECRET]))
    told.begin()
    log.add("one", submitted(SPEC), FAILED)
    assert told.sync(never) == 1
    kind, _, body = (tmp_path / "told").read_text().partition(" ")
    assert (kind, json.loads(body)["run_id"]) == ("failed", "one")


def run_python(code: str, seconds: float = 60) -> Command:
    return Command([sys.executable, "-c", code, SECRET], seconds)


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        (run_python("import sys; sys.exit('no ' + 'net')"), "exit code 1: no net"),
        (Command(["/nowhere/tell", SECRET]), "it cannot be started: No such file"),
        # Neither it nor a child that keeps its output open holds anybody up.
        (run_python("import subprocess; subprocess.run(['sleep', '600'])", 0.2), r"killed after 0\.2 s"),
        (Webhook(f"http://127.0.0.1:1/{SECRET}"), "does not answer: Connection refused"),
    ],
)
def test_why_a_notice_did_not_arrive_is_told_without_secrets(channel: Channel, message: str) -> None:
    with pytest.raises(NotSent, match=message) as refused:
        channel.send(notices.trial(0, "ada"))
    assert SECRET not in f"{refused.value} {channel.shown} {channel.identity}"


def test_a_webhook_that_never_answers_takes_a_bounded_time(hook: Hook) -> None:
    hook.hold.clear()
    with pytest.raises(NotSent, match=r"no answer within 0\.2 s|does not answer"):
        Webhook(hook.url, 0.2).send(notices.trial(0, "ada"))


def test_the_daemon_tells_even_while_the_webhook_fails_at_first(
    log: Log, hook: Hook, clean_environment: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    log.now = time.time_ns() // 1000
    notifier = log.notifier(Webhook(hook.url))
    log.add("past", submitted(SPEC), FAILED)
    begun = threading.Event()
    begin = notifier.begin
    notifier.begin = lambda: (begin(), begun.set())[0]  # type: ignore[method-assign, func-returns-value]
    thread = worker.of_channel(notifier, first_backoff=0.01)
    clean_environment["home"].mkdir()
    daemon = Daemon(log.store, settings_module.read(), Inventory(0, 1), notices=[thread])
    running = threading.Thread(target=daemon.run)
    with caplog.at_level(logging.WARNING, "sftd.notify"):
        running.start()
        assert begun.wait(PATIENCE)
        hook.answers = [500, 503]
        log.add("one", submitted(SPEC), FAILED)
        thread.wake()
        for _ in range(3):
            assert hook.arrived.acquire(timeout=PATIENCE)
        # The last record is sent before the daemon ends.
        log.add("two", submitted(SPEC), CANCELLED)
        daemon.stop()
        running.join(PATIENCE)
    assert [body["run_id"] for body in hook.bodies] == ["one", "two"]
    assert "webhook at 127.0.0.1: the answer is 500" in caplog.text
    assert SECRET not in caplog.text


def test_the_command_line_tries_it(
    hook: Hook, clean_environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_environment["home"].mkdir()
    assert "No notifications are configured" in CliRunner().invoke(main, ["notify"]).stdout
    monkeypatch.setenv("SFTD_NOTIFY_WEBHOOK", hook.url)
    monkeypatch.setenv("SFTD_NOTIFY_COMMAND", f"{sys.executable} -c 'raise SystemExit(3)' {SECRET}")
    monkeypatch.setenv("SFTD_NOTIFY_ON", "failed, retrying")
    shown = CliRunner().invoke(main, ["notify", "--test"])
    assert shown.exit_code == 1
    assert "webhook at 127.0.0.1: failed, retrying\n  the test has arrived" in shown.stdout
    assert "not sent: exit code 3" in shown.stdout
    assert hook.bodies[0]["kind"] == "test"
    rows = json.loads(CliRunner().invoke(main, ["notify", "--json"]).stdout)
    assert [row["pending"] for row in rows] == [None, None]
    told = environment(os.environ, token="t", device="cpu", threads=1, devices=[])
    assert SECRET not in json.dumps(told), "training is not told"
    assert SECRET not in unit(settings_module.read(), "user", "ada", os.environ)
    assert SECRET not in shown.output + json.dumps(rows) + repr(settings_module.read())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SFTD_NOTIFY_WEBHOOK", f"hooks.example.com/{SECRET}", "not a URL such as"),
        ("SFTD_NOTIFY_WEBHOOK", f"https://me:{SECRET}@hooks.example.com/x", "use a token in its path"),
        ("SFTD_NOTIFY_WEBHOOK", f"https://host:port/{SECRET}", "not a URL such as"),
        ("SFTD_NOTIFY_COMMAND", f"tell '{SECRET}", "No closing quotation"),
        ("SFTD_NOTIFY_ON", "ended,finished", "'finished' is not one of ended, failed"),
    ],
)
def test_settings_that_cannot_be_used_are_named_and_not_quoted(name: str, value: str, message: str) -> None:
    with pytest.raises(settings_module.SettingsError, match=f"^{name} .*{message}") as refused:
        settings_module.read({name: value, "SFTD_HOME": "/nowhere"})
    assert SECRET not in str(refused.value)
