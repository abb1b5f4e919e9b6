"""The `sftd` command: parse, call one operation, print. Each command's module is imported only when it is used."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import os
import signal
import sys
from typing import Any

import click
import msgspec

# Task → command → (module, one line of help). The help is here so that `sftd --help` imports no command.
_TASKS: dict[str, dict[str, tuple[str, str]]] = {
    "Train": {
        "demo": ("demo.command", "Fine-tune a real small model on this machine, from download to answer."),
        "prepare": ("submit.prepare", "Turn chats into tokenised Parquet for training."),
        "config": ("look.config", "List every key of a run's config."),
        "plan": ("plan.command", "Estimate memory, time and disk of a run, and find the best layout."),
        "submit": ("submit.command", "Queue a run."),
    },
    "Look": {
        "ls": ("look.ls", "List runs."),
        "show": ("look.show", "Show one run: status, progress, checkpoints, attempts."),
        "watch": ("watch.command", "Watch the queue, the devices and the runs, or one run, live."),
        "queue": ("look.queue", "List running and waiting runs, in order, and what each waits for."),
        "events": ("look.events", "Print a run's events."),
        "logs": ("look.logs", "Print the output of a run's ranks."),
        "checkpoints": ("look.checkpoints", "List a run's checkpoints and why each is kept."),
        "compare": ("compare.command", "Compare runs: settings and results."),
        "lineage": ("steer.fork", "Draw the tree of forks that a run belongs to."),
        "data": ("look.data", "Show which rows of the data a step saw."),
        "replay": ("look.replay", "Replay a run's log: its state at any moment."),
        "verify": ("compare.verify", "Train recorded steps again and compare them with the log."),
    },
    "Continue": {
        "resume": ("steer.resume", "Queue another attempt of a run."),
        "fork": ("steer.fork", "Start a new run from a checkpoint of another."),
        "pause": ("steer.hold", "Stop a run with a checkpoint, to continue it later."),
        "cancel": ("steer.resume", "End a run, with a checkpoint."),
        "hold": ("steer.hold", "Keep a waiting run from starting."),
        "release": ("steer.hold", "Return a held run to the queue."),
    },
    "Use the model": {
        "generate": ("steer.generate", "Answer prompts from a checkpoint."),
        "eval": ("steer.evaluate", "Evaluate a checkpoint, list results, compare answers."),
        "export": ("steer.export", "Write a checkpoint's model as a Hugging Face folder."),
    },
    "Operate": {
        "daemon": ("daemon.command", "Take runs from the queue and drive them."),
        "nodes": ("look.nodes", "List the daemons that share the database, and their devices."),
        "ui": ("operate.ui", "Open MLflow on the runs of this home."),
        "mlflow": ("operate.mlflow", "Compare MLflow with the log, rebuild it, register models."),
        "notify": ("operate.notify", "Show who is notified when runs end, and test it."),
        "gc": ("look.checkpoints", "Delete checkpoints that no retention rule protects."),
        "rm": ("steer.rm", "Remove runs: delete their files and hide them."),
        "import": ("steer.import_run", "Import a run that was trained without a daemon."),
        "db": ("db.command", "Check a database, back it up, restore or copy it."),
        "views": ("operate.init", "Rebuild the views folded from the log."),
    },
    "Set up": {
        "doctor": ("doctor.command", "Diagnose this installation and suggest fixes."),
        "init": ("operate.init", "Create or upgrade the database."),
        "completion": (
            "look.completion",
            "Print a script that completes commands and run names in a shell.",
        ),
    },
}
COMMANDS: dict[str, tuple[str, str]] = {
    name: entry for task in _TASKS.values() for name, entry in task.items()
}

_LS_SHOW = "`sftd ls` lists runs, `sftd show RUN` shows one, `sftd queue` shows what waits."
_SUBMIT = "`sftd submit CONFIG` queues a run, `sftd daemon --detach` starts the daemon that trains it."
_REMOVE = "`sftd rm RUN` removes a run and its files, `sftd gc` deletes checkpoints that no rule keeps, `sftd cancel RUN` ends a run."
_NAMES = "A run keeps its name, trainer.experiment_name; `sftd fork RUN trainer.experiment_name=NAME` starts one with another name."
# Similarity from which an unknown word counts as a misspelt command.
_NEAR = 0.75
# Words that users of other tools try → the command here. The most similar name could do something else.
HINTS: dict[str, str] = {
    "stop": "`sftd pause RUN` stops a run so that it can continue, `sftd cancel RUN` ends it; `sftd daemon --stop` ends the daemon.",
    "kill": "`sftd cancel RUN --now` kills a run; without --now it saves a checkpoint first.",
    "abort": "`sftd cancel RUN` ends a run, with --now at once.",
    "continue": "`sftd resume RUN` continues a run.",
    "restart": "`sftd resume RUN` continues a run, `sftd resume RUN --from-step 0` trains it from the beginning.",
    "status": _LS_SHOW,
    "ps": _LS_SHOW,
    "list": _LS_SHOW,
    "runs": _LS_SHOW,
    "info": _LS_SHOW,
    "find": "`sftd ls PATTERN` finds runs by id, name or sweep.",
    "search": "`sftd ls PATTERN` finds runs by id, name or sweep.",
    "run": _SUBMIT,
    "train": _SUBMIT,
    "start": _SUBMIT,
    "launch": _SUBMIT,
    "delete": _REMOVE,
    "remove": _REMOVE,
    "del": _REMOVE,
    "clean": _REMOVE,
    "rename": _NAMES,
    "name": _NAMES,
    "tag": _NAMES,
    "log": "`sftd logs RUN` prints the output of a run's ranks, `sftd events RUN` its events.",
    "tail": "`sftd logs -f RUN` follows the output of a run's ranks.",
    "diff": "`sftd compare RUN RUN` shows what differs.",
    "sweep": "`sftd submit CONFIG --grid KEY=VALUE,VALUE` queues a sweep, `sftd show SWEEP` ranks its runs.",
    "tokenize": "`sftd prepare` turns chats into tokenised Parquet.",
    "benchmark": "`sftd eval RUN` evaluates a checkpoint.",
    "chat": "`sftd generate RUN -p PROMPT` answers a prompt.",
    "version": "`sftd --version` prints the version.",
}


_RESTORE = ". Stop the daemon and put a backup in its place: `sftd db restore FILE`"


def _lock_hint() -> str:
    """A hint for a SQLite file that stays locked: a signal stopped the daemon in the middle of a transaction."""
    import psutil

    from sftd.cli import app
    from sftd.daemon import lock

    pid = lock.holder(app.read_settings().daemon_lock)
    if pid is None or psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        return ""
    return f". The daemon (pid {pid}) was stopped by a signal while it wrote; `kill -CONT {pid}` continues it"


def _is_completing() -> bool:
    """Whether a shell requests completions (`look/completion.py`)."""
    return "_SFTD_COMPLETE" in os.environ


class _Group(click.Group):
    """A group whose commands are imported on use, and whose errors are sentences, not tracebacks."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        from sftd.cli.terminal.border import guarded

        with guarded():
            return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sftd.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        if _is_completing():
            from sftd.cli.look.completion import complete_runs

            complete_runs(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:1] == ["help"]:
            if not args[1:]:
                click.echo(ctx.get_help())
                ctx.exit()
            args = [*args[1:], "--help"]
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            hint = HINTS.get(args[0].lower(), "")
            if not hint and (near := difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=_NEAR)):
                hint = f"Did you mean `sftd {near[0]}`?"
            raise click.UsageError(f"There is no command `{args[0]}`. {hint}".rstrip(), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The same width in every section aligns the texts.
        column = max(map(len, COMMANDS))
        for task, commands in _TASKS.items():
            with formatter.section(task):
                formatter.write_dl([(name.ljust(column), text) for name, (_, text) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        from sftd.domain.errors import SftdError
        from sftd.settings import SettingsError

        # Importing SQLAlchemy creates many objects and no garbage, and collection takes a fifth of `sftd ls`. The freeze
        # skips the collection at exit, when the process frees everything anyway.
        gc.set_threshold(200_000)
        atexit.register(gc.freeze)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            from sftd.cli.terminal import output

            # On a new line: the terminal shows ^C.
            output.note(f"\ninterrupted. {ctx.meta.get(output.INTERRUPTION, '')}".rstrip())
            # The exit code that shells use after SIGINT.
            sys.exit(128 + signal.SIGINT)
        except SftdError as error:
            from sftd.cli.terminal.output import print_error

            print_error(error)
            sys.exit(error.exit_code)
        except SettingsError as error:
            click.echo(f"sftd: {error}", err=True)
            sys.exit(2)
        except (OSError, UnicodeError, OverflowError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly
            click.echo(f"sftd: {error}", err=True)
            sys.exit(1)
        except msgspec.MsgspecError as error:
            # All other decoders handle their errors where they read.
            click.echo(
                f"sftd: a row of the database cannot be read: {error}. `sftd db check` names it", err=True
            )
            sys.exit(1)
        except Exception as error:
            # Looked up, not imported: if it is not loaded, the error is not its.
            alchemy = sys.modules.get("sqlalchemy")
            if alchemy is None or not isinstance(error, alchemy.exc.DBAPIError):
                raise
            reason = str(error.orig).strip().splitlines()[0]
            hint = _lock_hint() if "locked" in reason else _RESTORE if "malformed" in reason else ""
            click.echo(f"sftd: the database: {reason}{hint}", err=True)
            sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sftd", message="sftd %(version)s")
def main() -> None:
    """Submit fine-tuning runs and walk away; prove afterwards what happened.

    \b
    Example:
      sftd demo                     a real model, fine-tuned in minutes
      sftd daemon --detach          start the daemon
      sftd submit run.yaml -q       queue a run, print its id
      sftd ls                       its status

    `sftd help COMMAND` explains a command, with examples.

    Exit codes: 0 ok, 1 the run or the operation failed, 2 the request was refused, 130 Ctrl-C.
    """


if _is_completing():
    # Registers completion classes that replace click's.
    importlib.import_module("sftd.cli.look.completion")
