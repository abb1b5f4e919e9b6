"""Print the command reference in Markdown, from the commands' help:

python scripts/cli_reference.py > docs/cli.md
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from sftd.cli import main as sftd


def markdown() -> str:
    """The whole reference, wrapped at 100 columns on any terminal."""
    return "\n".join(
        (
            "# Command reference",
            "",
            "Made by `python scripts/cli_reference.py > docs/cli.md` from the commands' own help; a test fails when it is out of",
            "date. `sftd COMMAND --help` prints the same.",
            "",
            *_command(sftd, "sftd", None),
            "",
        )
    )


def _command(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=100, help_option_names=["-h", "--help"]
    )
    yield f"## `{context.command_path}`"
    yield ""
    yield "```text"
    yield command.get_help(context).rstrip()
    yield "```"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            if found is not None and not found.hidden:
                yield ""
                yield from _command(found, inner, context)


if __name__ == "__main__":
    print(markdown(), end="")
