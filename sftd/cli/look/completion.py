"""`sftd completion`, and the completion of run names."""

from __future__ import annotations

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)
from click.types import StringParamType

_MOST = 200
_VARIABLE = "_SFTD_COMPLETE"


class RunName(StringParamType):
    """The type of an argument that names a run. It only completes: the command decides which run is meant."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The newest runs whose ids begin with `incomplete`; none if the database does not answer."""
        from sftd import settings
        from sftd.store.queries.names import run_names

        try:
            url = settings.read().database_url
        except settings.SettingsError:
            return []
        given = {value for value in ctx.params.get(param.name or "", ()) or () if isinstance(value, str)}
        return [
            CompletionItem(run_id, help=status)
            for run_id, status in run_names(url, incomplete, _MOST)
            if run_id not in given
        ]


def complete_runs(command: click.Command) -> None:
    """Complete ids in every argument of a command that names runs, and in `--after`."""
    for parameter in command.params:
        if parameter.name in ("run", "runs", "prefixes", "after"):
            parameter.type = RunName()


@add_completion_class
class _Bash(BashComplete):
    """bash splits `--option=value` into three words. click takes the second, `=`, for the value."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the cursor, and the one at it."""
        args, incomplete = super().get_completion_args()
        return args[:-1] if args[-1:] == ["="] else args, incomplete


class _WholeWord(ShellComplete):
    """zsh and fish replace the whole word `--option=value`; click completes the value alone."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """The candidates for a word."""
        found = super().get_completions(args, incomplete)
        option, mark, _ = incomplete.partition("=")
        if mark and option.startswith("--"):
            for item in found:
                item.value = f"{option}={item.value}" if item.type == "plain" else item.value
        return found


@add_completion_class
class _Zsh(_WholeWord, ZshComplete):
    pass


@add_completion_class
class _Fish(_WholeWord, FishComplete):
    pass


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, options and run names in SHELL.

    bash: put `eval "$(sftd completion bash)"` into ~/.bashrc. zsh: the same with zsh into ~/.zshrc, after compinit. fish:
    write the script to ~/.config/fish/completions/sftd.fish.

    \b
    Example:
      eval "$(sftd completion bash)"
    """
    from sftd.cli import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "sftd", _VARIABLE).source())
