"""`sftd doctor`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.finding import Finding
    from sftd.launcher.seam import Registered
    from sftd.settings import Settings
    from sftd.store.database.engine import Store

_STYLE = {"ok": "green", "warning": "yellow", "broken": "bold red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def doctor_command(as_json: bool) -> None:
    """Diagnose this installation and suggest fixes.

    Makes SFTD_HOME where there is none, and changes nothing else. Exits with 1 if something is broken; warnings do not count.

    \b
    Example:
      sftd doctor
      sftd doctor --json | jq '.[] | select(.state != "ok")'
    """
    settings = app.read_settings()
    app.make_home(settings)
    with output.console(stderr=True).status("checking"):
        found = list(_examine(settings))
    if as_json:
        click.echo(output.json_line(found))
    else:
        _print(found)
    sys.exit(1 if any(f.state == "broken" for f in found) else 0)


def _examine(settings: Settings) -> Iterator[Finding]:
    from sftd.cli.doctor import host, services
    from sftd.domain.spec.launch.launchers import KINDS
    from sftd.launcher.choosing import LAUNCHERS
    from sftd.projections.mirrors import MIRRORS

    yield from host.python()
    count, gpus = host.gpus()
    yield from gpus
    yield from _guarded("torch", lambda: host.trainer(count))
    yield from _guarded("disk", lambda: host.disk(settings))
    yield from host.limits()
    yield from host.ports()
    yield from host.clock()
    store = None

    def database() -> list[Finding]:
        nonlocal store
        store, found = services.database(settings)
        return found

    yield from _guarded("database", database)
    for mirror in MIRRORS:
        yield from _guarded(mirror.name, partial(mirror.check, settings))
    yield from _guarded("daemon", lambda: services.daemon(settings, store))
    for name, registered in LAUNCHERS.items():
        examine = partial(_launcher, registered, settings, store)
        yield from _guarded(KINDS[name].shown, examine)
    yield from _guarded("leftovers", lambda: services.leftovers(settings, store))
    if store is not None:
        store.engine.dispose()


def _launcher(registered: Registered, settings: Settings, store: Store | None) -> Iterable[Finding]:
    from sftd.cli.doctor import services

    return registered.doctor(services.daemon_devices(settings, store))


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error in it is a finding, so that the other checks run."""
    import sqlalchemy as sa

    from sftd.domain.errors import SftdError
    from sftd.domain.finding import broken

    try:
        yield from check()
    except (SftdError, OSError, ValueError, sa.exc.SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        yield broken(name, reason, _FIXES.get(name, "fix this, and run `sftd doctor` again"))


_FIXES = {
    "database": "check SFTD_DATABASE_URL, and that the server runs and accepts your login",
    "disk": "SFTD_HOME must be a folder that you can write to",
}


def _print(found: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        text = Text(finding.said)
        if finding.fix:
            text.append(f"\nfix: {finding.fix}", "dim")
        table.add_row(Text(finding.state, _STYLE[finding.state]), finding.check, text)
    out = output.console()
    out.print(table)
    counts = {state: sum(f.state == state for f in found) for state in _STYLE}
    out.print(f"\n{counts['ok']} ok, {counted(counts['warning'], 'warning')}, {counts['broken']} broken")
