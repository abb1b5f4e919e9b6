"""`sftd nodes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output

if TYPE_CHECKING:
    from sftd.operations.queries.nodes import Node

_STYLE = {"alive": "green", "not observed": "yellow", "stopped": "dim"}


@click.command("nodes")
@click.option("-a", "--all", "everyone", is_flag=True, help="List every daemon that ever started.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def nodes_command(everyone: bool, as_json: bool) -> None:
    """List the daemons that share this database: their devices and runs, and when each was last seen.

    "Not observed" does not mean dead: a host that is cut off from the database continues to train. Only a daemon's own host
    can prove that it is gone.

    \b
    Example:
      sftd nodes
      sftd nodes --json | jq '[.[] | select(.state == "alive") | .devices.gpus.free] | add'
    """
    from sftd.operations.queries import nodes

    settings = app.read_settings()
    store = app.open_store(settings)
    found = nodes.list_nodes(store, app.context(), settings.silent_micros, everyone=everyone)
    if as_json:
        click.echo(output.json_line([node_json(node) for node in found]))
    elif not found:
        click.echo("No daemon has used this database yet. `sftd daemon --detach` starts one.")
    else:
        _print(found)


def node_json(node: Node) -> dict[str, Any]:
    """A daemon for scripts."""
    import msgspec

    values = msgspec.structs.asdict(node)
    for name in ("started_at", "seen_at"):
        values[name] = output.iso(values[name])
    values["devices"] = {
        kind: {"total": d.total, "used": d.used, "free": d.free} for kind, d in node.devices.items()
    }
    return values


def _print(found: list[Node]) -> None:
    from rich.text import Text

    table = output.table("host", "state", "used", "daemon", "drives", fold=["host", "daemon"])
    for node in found:
        devices = [f"{d.used}/{d.total} {kind}" for kind, d in node.devices.items() if d.total]
        table.add_row(
            Text(node.host, "bold"),
            Text(_state(node), _STYLE[node.state]),
            Text("\n".join(devices)),
            Text(node.daemon, "dim"),
            Text("\n".join(node.runs)),
        )
    output.console().print(table)


def _state(node: Node) -> str:
    if node.state == "alive":
        return f"alive, seen\n{output.duration(node.unseen_seconds)} ago"
    label = "stopped" if node.state == "stopped" else "not observed since"
    return f"{label}\n{output.clock(node.seen_at)}"
