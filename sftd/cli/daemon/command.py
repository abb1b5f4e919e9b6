"""`sftd daemon`."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.daemon.worker import Worker
    from sftd.store.database.engine import Store

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
# Between two attempts to open the database.
_DATABASE_SECONDS = 1.0


@click.command("daemon")
@click.option("--detach", is_flag=True, help="Run in the background, logging to SFTD_HOME/logs/daemon.log.")
@click.option("--drain", is_flag=True, help="End when the queue is empty.")
@click.option(
    "--stop", "stop_it", is_flag=True, help="Stop the running daemon; training continues without it."
)
@click.option(
    "--status", "status", is_flag=True, help="Print whether a daemon runs; exit with 1 if none does."
)
@click.option(
    "--print-systemd",
    "unit",
    is_flag=False,
    flag_value="user",
    type=click.Choice(["user", "system"]),
    help="Print a systemd unit for this home; `--print-systemd system` runs it at boot, as you.",
)
def daemon_command(detach: bool, drain: bool, stop_it: bool, status: bool, unit: str | None) -> None:
    """Take runs from the queue and drive them: launch them with torchrun, record their events, restart those that fail.

    It may be stopped or killed at any time: training continues, and the next daemon takes it over.

    \b
    Example:
      sftd daemon                  in the foreground
      sftd daemon --detach         in the background
      sftd daemon --drain          until the queue is empty
      sftd daemon --print-systemd > ~/.config/systemd/user/sftd.service
    """
    from sftd.daemon import lock

    settings = app.read_settings()
    if unit is not None:
        from sftd.cli.daemon import systemd

        click.echo(systemd.unit(settings, unit, app.user_name(), os.environ), nl=False)
        return
    if status or stop_it:
        app.require_home(settings)
    else:
        app.make_home(settings)
    holder = lock.holder(settings.daemon_lock)
    if status:
        click.echo(f"a daemon runs, pid {holder}" if holder else "no daemon runs")
        sys.exit(0 if holder else 1)
    if stop_it:
        _stop(settings, holder)
    elif detach:
        start_detached(settings, drain=drain)
    else:
        run_daemon(settings, drain=drain)


def _stop(settings: Settings, holder: int | None) -> None:
    from sftd.daemon import lock
    from sftd.domain.errors import SftdError

    if holder is None:
        click.echo("no daemon runs")
        return
    os.kill(holder, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while lock.holder(settings.daemon_lock) == holder:
        if time.monotonic() > deadline:
            raise SftdError(f"the daemon (pid {holder}) does not stop; see {settings.logs / 'daemon.log'}")
        time.sleep(0.05)
    click.echo(f"stopped the daemon (pid {holder})")


def resolved(settings: Settings) -> dict[str, str]:
    """Variables that give a process in another folder the same settings: a relative path would mean another file there."""
    return {
        "SFTD_HOME": str(settings.home),
        "SFTD_DATABASE_URL": settings.database_url,
        "SFTD_METRICS_FILE": str(settings.metrics_file),
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
    }


def start_detached(settings: Settings, *, drain: bool = False, quiet: bool = False) -> int:
    """Start a daemon in the background and wait until it holds the lock. Returns its pid."""
    from sftd.daemon import lock
    from sftd.domain.errors import SftdError
    from sftd.launcher.inventory import visible_gpus

    if (pid := lock.holder(settings.daemon_lock)) is not None:
        import psutil

        with contextlib.suppress(psutil.Error):
            if "--drain" in psutil.Process(pid).cmdline():
                raise lock.AlreadyRunning(
                    f"A daemon of this home is running already (pid {pid}), but ends when the queue is empty (--drain), as the "
                    "demo's does. `sftd daemon --stop` ends it now; its runs continue."
                )
        raise lock.AlreadyRunning(f"A daemon of this home is running already (pid {pid}).")
    # Check here, where the error is printed; in the background it is only in the log.
    visible_gpus()
    _wait_until_alone(settings, app.open_store(settings))
    settings.logs.mkdir(mode=0o700, exist_ok=True)
    log = settings.logs / "daemon.log"
    argv = [sys.executable, "-P", "-m", "sftd", "daemon", *(["--drain"] if drain else [])]
    env = os.environ | resolved(settings) | {"SFTD_DAEMON_LOG": str(log)}
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
        child = subprocess.Popen(
            argv,
            cwd=settings.home,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_SECONDS
    while lock.holder(settings.daemon_lock) != child.pid:
        if child.poll() is not None:
            raise SftdError(f"the daemon ended at once (exit code {child.returncode}); see {log}")
        if time.monotonic() > deadline:
            raise SftdError(f"the daemon did not start; see {log}")
        time.sleep(0.05)
    if not quiet:
        click.echo(f"daemon started, pid {child.pid}, log {log}")
    return child.pid


def _wait_until_alone(settings: Settings, store: Store) -> None:
    """Raises `NotAlone` when a daemon with this host name and home path runs elsewhere."""
    from sftd.daemon.registration import Registration, this_daemon

    registration = Registration(store, app.context(), settings, this_daemon(settings, {}))
    while not registration.is_free():
        time.sleep(settings.poll_seconds)


def set_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # In a thread: `set` takes a lock, which the interrupted main thread may hold on its way into `wait`.
        signal.signal(number, lambda *_: _thread.start_new_thread(stop.set, ()))
    return stop


def run_daemon(settings: Settings, *, drain: bool) -> None:
    """Run the daemon in this process until it is stopped; with `drain`, until the queue is empty."""
    from sftd.daemon import log
    from sftd.daemon.lock import DaemonLock
    from sftd.daemon.loop import Daemon
    from sftd.domain.errors import SftdError
    from sftd.launcher import device_holds
    from sftd.launcher.choosing import LAUNCHERS, ByName
    from sftd.launcher.inventory import Inventory, visible_gpus
    from sftd.projections.mirrors import MIRRORS
    from sftd.wire.cores import usable_cores

    # New files are private, those of MLflow too.
    os.umask(0o077)
    log.set_up(settings.log_format)
    stop = set_on_signals()
    # Fail before taking over runs: a daemon that sees no GPUs would train on CPUs.
    gpus = visible_gpus()
    with DaemonLock(settings.daemon_lock):
        # A service may start before its database server, and waits for it. With `--drain` a user waits and needs the error;
        # with SQLite waiting does not help.
        at_once = drain or settings.database_url.startswith("sqlite")
        store = app.open_store(settings) if at_once else _open_when_it_answers(settings, stop)
        if store is None:
            return
        places = {name: registered.places(settings) for name, registered in LAUNCHERS.items()}
        others = partial(device_holds.held, settings.home)
        cores = settings.cpu_slots or usable_cores()
        inventory = Inventory(gpus, cores, places, others=others)
        launcher = ByName({name: registered.make(settings) for name, registered in LAUNCHERS.items()})
        notices = _notices(settings, store)
        daemon = Daemon(store, settings, inventory, launcher, stop, MIRRORS, notices)
        try:
            daemon.run(drain=drain)
        except SftdError as error:
            logging.getLogger("sftd.daemon").critical("%s. The daemon ends, training continues", error)
            sys.exit(1)
        except Exception as error:
            if "malformed" in str(error):
                text = "the database is damaged (%s); the daemon ends, training continues. Use `sftd db restore FILE`"
                logging.getLogger("sftd.daemon").critical(text, error)
                sys.exit(1)
            # The traceback goes to the log, in the log's format. Training continues.
            logging.getLogger("sftd.daemon").critical("the daemon ends on an error", exc_info=True)
            sys.exit(1)


def _open_when_it_answers(settings: Settings, stop: threading.Event) -> Store | None:
    """The store, once its database answers; None if `stop` is set before that. Raises `DatabaseNotReady`."""
    from sftd.daemon.loop import DATABASE_ERRORS
    from sftd.store.database.engine import DatabaseUnreachable, open_engine

    # Waiting does not fix an invalid URL: raise at once.
    open_engine(settings.database_url).dispose()
    reported = ""
    while not stop.is_set():
        try:
            return app.open_store(settings)
        except (DatabaseUnreachable, *DATABASE_ERRORS) as error:
            # The connection may also break between two queries.
            text = str(getattr(error, "orig", error)).strip()
            if text != reported:
                reported = text
                logging.getLogger("sftd.daemon").warning("%s; trying again", text)
        stop.wait(_DATABASE_SECONDS)
    return None


def _notices(settings: Settings, store: Store) -> list[Worker]:
    if not (settings.notify_command or settings.notify_webhook):
        return []
    from sftd.cli.operate.notify import notifiers
    from sftd.daemon.worker import of_channel

    return [of_channel(notifier) for notifier in notifiers(settings, store)]
