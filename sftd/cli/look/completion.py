"""`sftd completion`, and how names of runs complete."""

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

# More do not help anybody to choose.
_LIMIT = 200
_VARIABLE = "_SFTD_COMPLETE"


class RunName(StringParamType):
    """A run's id or the beginning of it. Only the shell makes use of it: which run is meant is decided by the command."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The newest runs that begin so; none when the database cannot be asked."""
        from sftd import settings
        from sftd.store.queries.names import run_names

        try:
            url = settings.read().database_url
        except settings.SettingsError:
            return []
        given = {value for value in ctx.params.get(param.name or "", ()) or () if isinstance(value, str)}
        return [
            CompletionItem(run_id, help=status)
            for run_id, status in run_names(url, incomplete, _LIMIT)
            if run_id not in given
        ]


def complete_runs(command: click.Command) -> None:
    """Have every argument of a command that names runs, and `--after`, complete them."""
    for parameter in command.params:
        if parameter.name in ("run", "runs", "prefixes", "after"):
            parameter.type = RunName()


class _Values(ShellComplete):
    """Completes `--option=value` as `--option value`, which click alone does in no shell."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What can come next. zsh and fish take `--option=value` for one word, and replace all of it."""
        option, mark, value = incomplete.partition("=")
        if not mark or not option.startswith("--"):
            return super().get_completions(args, incomplete)
        found = super().get_completions([*args, option], value)
        for item in found:
            item.value = f"{option}={item.value}" if item.type == "plain" else item.value
        return found


class _Bash(_Values, BashComplete):
    """For bash, `--option=value` is three words, of which it replaces the last."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What can come next."""
        if incomplete == "=":
            incomplete = ""
        elif args[-1:] == ["="]:
            args = args[:-1]
        return super().get_completions(args, incomplete)


class _Zsh(_Values, ZshComplete):
    pass


class _Fish(_Values, FishComplete):
    pass


def complete_values() -> None:
    """Have click use these."""
    for shell in (_Bash, _Zsh, _Fish):
        add_completion_class(shell)


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print the script that completes commands, options and the names of runs in SHELL.

    bash: put `eval "$(sftd completion bash)"` into ~/.bashrc. zsh: the same with zsh into ~/.zshrc, behind compinit. fish:
    write the script to ~/.config/fish/completions/sftd.fish.

    \b
    Example:
      eval "$(sftd completion bash)"
    """
    from sftd.cli import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "sftd", _VARIABLE).source())
