"""`sftd config`."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

import click

from sftd.cli import output


@click.command("config")
@click.argument("prefix", required=False, default="")
@click.option("--markdown", is_flag=True, help="Print the configuration reference, docs/configuration.md.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def config_command(prefix: str, markdown: bool, as_json: bool) -> None:
    """List every key of a run's config: type, default, meaning. PREFIX narrows it down.

    \b
    Example:
      sftd config
      sftd config model.megatron
    """
    rows = [row for row in keys() if row["key"].startswith(prefix)]
    if not rows:
        raise click.UsageError(f"No key begins with {prefix!r}.{_meant(prefix)}")
    if as_json:
        click.echo(output.json_line(rows))
    elif markdown:
        click.echo(reference(), nl=False)
    else:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("key", no_wrap=True, style="bold")
        table.add_column("type", overflow="fold", ratio=1)
        table.add_column("default", overflow="fold", ratio=1)
        table.add_column("meaning", overflow="fold", ratio=3)
        for row in rows:
            table.add_row(row["key"], row["type"], _shown(row["default"]), row["meaning"])
        output.console().print(table)


def _meant(name: str) -> str:
    """What a person may have meant by a name that no key begins with: verl's name of a key, a part of one, or misspelt."""
    import difflib

    from sftd.domain.spec_parse import ALIASES

    if name in ALIASES or name == "optim.min_lr":
        return f" It is another name: {_alias_target(name)}."
    paths = [row["key"] for row in keys()]
    near = [path for path in paths if name in path] or difflib.get_close_matches(name, paths, n=3)
    return f" Did you mean {', '.join(near[:5])}?" if near else " `sftd config` lists all."


def keys() -> list[dict[str, Any]]:
    """Every key of the spec: key, type, default, meaning."""
    from sftd.domain.spec_parse import leaves

    return [
        {"key": path, "type": _type(annotation), "default": default, "meaning": _meaning(annotation)}
        for path, annotation, default in leaves()
    ]


def _meaning(annotation: Any) -> str:
    found = [m.description for m in getattr(annotation, "__metadata__", ()) if m.description]
    return str(found[-1]) if found else ""


def _type(annotation: Any) -> str:
    metadata = getattr(annotation, "__metadata__", ())
    if metadata:
        base = _type(annotation.__origin__)
        for bound, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            limits = [getattr(m, bound) for m in metadata if getattr(m, bound, None) not in (None, 2**53)]
            base += "".join(f" {sign} {limit:g}" for limit in limits)
        return base
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    if values := get_args(annotation):
        return " | ".join(map(str, values))
    return {int: "int", float: "float", bool: "bool", str: "text"}[annotation]


def _shown(default: Any) -> str:
    return default if isinstance(default, str) else output.json_line(default)


def reference() -> str:
    """The configuration reference in Markdown."""
    from sftd.domain.spec_parse import ALIASES

    lines = [
        "# Configuration reference",
        "",
        "Made by `sftd config --markdown` from `sftd/domain/spec.py`; a test fails when it is out of date.",
        "",
        "A run's config is a YAML file of sections; `key=value` on the command line is laid over it. The resolved spec is",
        "frozen when the run is submitted, and its digest names it (`sftd submit CONFIG --dry-run` prints it).",
    ]
    section = None
    for row in keys():
        name, _, key = row["key"].rpartition(".")
        if name != section:
            section = name
            lines += ["", f"## `{name}`", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        kind = row["type"].replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | `{_shown(row['default']) or '""'}` | {row['meaning']} |")
    lines += ["", "## Other names", "", "verl's names are taken where they mean the same.", ""]
    lines += ["| name | here |", "|---|---|"]
    for alias in [*ALIASES, "optim.min_lr"]:
        lines.append(f"| `{alias}` | {_alias_target(alias)} |")
    return "\n".join(lines) + "\n"


def _alias_target(alias: str) -> str:
    from sftd.domain.spec_parse import ALIASES, UnusableAlias

    if alias == "optim.min_lr":
        return "`scheduler.min_lr_ratio` (divided by the peak)"
    for probe in (1, [0, 0], "auto"):
        try:
            targets = ALIASES[alias](probe)
        except UnusableAlias:
            continue
        return ", ".join(f"`{t}`" for t in targets) or "accepted; it is what sftd always does"
    return "refused, with what to do instead"
