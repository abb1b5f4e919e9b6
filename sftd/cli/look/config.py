"""`sftd config`."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

import click

from sftd.cli.terminal import output


@click.command("config")
@click.argument("word", required=False, default="")
@click.option("--markdown", is_flag=True, help="Print the configuration reference, docs/configuration.md.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def config_command(word: str, markdown: bool, as_json: bool) -> None:
    """List every key of a run's config: type, default, meaning. WORD narrows it down.

    WORD is the beginning of a key, or else searched for in keys, in their other names and in their meanings. Names of
    axolotl, LLaMA-Factory, TRL and verl are known too.

    \b
    Example:
      sftd config
      sftd config model.megatron
      sftd config packing
    """
    rows, remark = find(word)
    if remark:
        output.note(remark)
    if not rows and not remark:
        raise click.UsageError(f"There is no key {word!r}. {_meant(word)}")
    if as_json:
        click.echo(output.json_line(rows))
    elif markdown:
        click.echo(reference(), nl=False)
    else:
        import textwrap

        for row in rows:
            default = _shown(row["default"]) or '""'
            click.echo(f"{click.style(row['key'], bold=True)}  {row['type']}, default {default}")
            click.echo(textwrap.indent(textwrap.fill(row["meaning"], min(output.width(), 120) - 4), "    "))


def find(word: str) -> tuple[list[dict[str, Any]], str]:
    """The keys that match a word, and a remark where it is another trainer's name."""
    from sftd.domain.spec.aliases import ALIASES
    from sftd.domain.spec.other_trainers import TABLE, TOOLS, known

    rows = keys()
    if begun := [row for row in rows if row["key"].startswith(word)]:
        return begun, ""
    if (row := known(word)) is not None:
        tools = ", ".join(name for letter, name in TOOLS.items() if letter in row.tools)
        meaning = f"here it is {row.answer}" if row.here else f"it has no counterpart here: {row.note}"
        return [r for r in rows if r["key"] == row.here], f"{row.name} is a name of {tools}; {meaning}"
    text = word.lower()
    also = {target for name, alias in ALIASES.items() if text in name for target in alias.keys}
    also |= {row.here for row in TABLE if text in row.name}
    return [
        row
        for row in rows
        if text in row["key"].lower() or text in row["meaning"].lower() or row["key"] in also
    ], ""


def _meant(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word[:100], [row["key"] for row in keys()], n=3)
    return f"Did you mean {', '.join(near)}?" if near else "`sftd config` lists all."


def keys() -> list[dict[str, Any]]:
    """Every key of the spec: key, type, default, what a resume may do with it, meaning."""
    from sftd.domain.run.trajectory import on_resume
    from sftd.domain.spec.parse import leaves

    return [
        {
            "key": path,
            "type": _type(annotation),
            "default": default,
            "on_resume": on_resume(path),
            "meaning": _meaning(annotation),
        }
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
    from sftd.domain.spec.aliases import ALIASES

    lines = [
        "# Configuration reference",
        "",
        "Made by `sftd config --markdown` from `sftd/domain/spec/spec.py`; a test fails when it is out of date.",
        "",
        "A run's config is a YAML file of sections; `key=value` on the command line is laid over it. The resolved spec is",
        "frozen when the run is submitted, and its digest names it (`sftd submit CONFIG --dry-run` prints it).",
        "",
        "Relative paths start at the folder where you submit. `~`, `$NAME` and `${NAME}` are expanded. For data, a pattern",
        "(`*`, `?`, `[…]`, `**`) becomes the files that match and a folder the `*.parquet` files in it, in the order of their names.",
        "A name that exists as it is written is taken as it is. The model may be a hub id (`org/name`) that is in the local Hugging",
        "Face cache (`HF_HUB_CACHE`, `HF_HOME`).",
        "",
        "The column `resume` says what a new value does to the steps that a run already has. `free`: they stay the same, at most to",
        "within rounding, so a resume may change the key. `length`: they stay the same as long as their learning rates do. `fixed`:",
        "they would differ, so only a fork may change the key.",
        "",
        "YAML is read as version 1.2: `true` and `false` are the booleans, `1e-5` is a number, `yes` is a text.",
    ]
    section = None
    for row in keys():
        name, _, key = row["key"].rpartition(".")
        if name != section:
            section = name
            lines += [
                "",
                f"## `{name}`",
                "",
                "| key | type | default | resume | meaning |",
                "|---|---|---|---|---|",
            ]
        kind = row["type"].replace("|", "\\|")
        lines.append(
            f"| `{key}` | {kind} | `{_shown(row['default']) or '""'}` | {row['on_resume']} | {row['meaning']} |"
        )
    lines += [
        "",
        "## Other names",
        "",
        "Accepted where they mean the same; most are verl's. [coming-from.md](coming-from.md) has those of other trainers.",
        "",
    ]
    lines += ["| name | here |", "|---|---|"]
    for alias in ALIASES:
        lines.append(f"| `{alias}` | {_alias_target(alias)} |")
    return "\n".join(lines) + "\n"


def _alias_target(alias: str) -> str:
    from sftd.domain.spec.aliases import ALIASES, MIN_LR, UnusableAlias

    here = ", ".join(f"`{target}`" for target in ALIASES[alias].keys)
    if alias == MIN_LR:
        return f"{here} (divided by the peak)"
    if here:
        return here
    try:
        ALIASES[alias].translate("auto")
    except UnusableAlias:
        return "refused, with what to do instead"
    return "accepted; it is what sftd always does"
