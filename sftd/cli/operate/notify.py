"""`sftd notify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.settings import Settings

if TYPE_CHECKING:
    from sftd.projections.notices.notifier import Notifier
    from sftd.store.database.engine import Store

_SET = "Set SFTD_NOTIFY_WEBHOOK to a URL, or SFTD_NOTIFY_COMMAND to a command, for the daemon (docs/notifications.md)."


@click.command("notify")
@click.option("--test", "test", is_flag=True, help="Send a test to each channel now.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def notify_command(test: bool, as_json: bool) -> None:
    """Show who is notified when runs end, fail, or show an anomaly; with --test, send a notice.

    The settings of this shell are used; the daemon uses those of the shell that started it, or of SFTD_HOME/config.toml.
    Exits with 1 when a test does not arrive.

    \b
    Example:
      SFTD_NOTIFY_WEBHOOK=https://hooks.example.com/services/T0/B0/x sftd notify --test
    """
    settings = app.read_settings()
    app.require_home(settings)
    is_set = settings.notify_command or settings.notify_webhook
    found = notifiers(settings, app.open_store(settings)) if is_set else []
    rows = [_row(settings, notifier, test=test) for notifier in found]
    if as_json:
        click.echo(output.json_line(rows))
    else:
        if not rows:
            click.echo(f"No notifications are configured. {_SET}")
        for row in rows:
            state = "" if row["pending"] is None else f"; {_counted(row['pending'])} not sent yet"
            click.echo(f"{row['channel']}: {', '.join(settings.notify_on)}{state}")
            if test:
                click.echo(
                    "  the test has arrived" if row["error"] is None else f"  not sent: {row['error']}"
                )
    sys.exit(1 if any(row["error"] for row in rows) or (test and not rows) else 0)


def _counted(pending: object) -> str:
    from sftd.projections.notices.notifier import PAGE

    return f"{PAGE} or more" if pending == PAGE else str(pending)


def notifiers(settings: Settings, store: Store) -> list[Notifier]:
    """One notifier for each configured channel."""
    from sftd.projections.notices.channels import channels
    from sftd.projections.notices.notifier import Notifier

    now = app.context().now
    return [
        Notifier(store, channel, settings.notify_on, now)
        for channel in channels(settings.notify_command, settings.notify_webhook, settings.home)
    ]


def _row(settings: Settings, notifier: Notifier, *, test: bool) -> dict[str, object]:
    from sftd.domain.notices import trial
    from sftd.projections.notices.channels import NotSent

    error = None
    if test:
        try:
            notifier.channel.send(trial(app.context().now(), app.user_name()))
        except NotSent as not_sent:
            error = str(not_sent)
    return {
        "channel": notifier.channel.shown,
        "kinds": list(settings.notify_on),
        "pending": notifier.pending_count(),
        "error": error,
    }
