"""`sftd demo`: a whole run on real input, shown as it happens."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.demo.view import LiveSteps, answers, redone_lines, validation_line
from sftd.cli.terminal import output
from sftd.cli.terminal.progress import run_with_bar
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from sftd.domain.log.events import Recorded
    from sftd.settings import Settings
    from sftd.store.database.engine import Store

DEFAULT_MODEL = "smollm2"
# A small part of the split is enough to see a clear fall, and takes seconds instead of half a minute.
_VAL_ROWS = 64
_SAVE_INTERVAL = 8
_POLL_SECONDS = 0.2


@click.command("demo")
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help="Model folder or hub name instead of SmolLM2-135M.",
)
@click.option("--crash", is_flag=True, help="Kill the training ranks midway and watch the run recover.")
@click.option("--lora", is_flag=True, help="Train adapters beside the frozen model, and prove their export.")
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True, help="Optimizer steps.")
def demo_command(model: str, crash: bool, lora: bool, steps: int) -> None:
    """Fine-tune a real small model on this machine, from download to answer, in a few minutes on two cores.

    SmolLM2-135M-Instruct learns to answer questions about Python's standard library in the words of its docstrings.
    Model and data are kept in the user's cache; the run stays in SFTD_HOME, like any other.

    \b
    Example:
      sftd demo
      sftd demo --crash
      sftd demo --lora
    """
    from sftd.domain.errors import Problem, Refused

    if crash and steps < _SAVE_INTERVAL + 4:
        raise Refused(
            Problem("--steps", f"{steps} are too few for --crash", f"use at least {_SAVE_INTERVAL + 4}")
        )
    out = output.console()
    settings = app.read_settings()
    app.make_home(settings)
    cache = _cache_dir()

    _headline(out, 1, "the model")
    # Downloads or builds the model if it is missing.
    folder = run_with_bar("model", "bytes", ["model", model, "--cache", str(cache)])["path"]
    out.print(f"   {folder}", style="dim", soft_wrap=True)
    _headline(out, 2, "the data: questions about this Python's standard library")
    data = _make_data(folder, cache)
    out.print(f"   {data['summary']}")
    _show_row(out, data["train"], folder)
    _headline(out, 3, "the run")
    config = _write_config(settings, folder, data, steps, lora=lora)
    out.print(f"   {config}", style="dim", soft_wrap=True)
    store = app.open_store(settings)
    run_id = _submit(store, config, settings.home)
    out.print(f"   submitted as [bold]{run_id}[/]")
    _start_daemon(settings)
    try:
        history = _follow(out, store, run_id, steps, crash_at=_SAVE_INTERVAL + 4 if crash else None)
    except KeyboardInterrupt:
        out.print(
            f"\n   Training continues without this window: sftd events -f {run_id}, sftd cancel {run_id}"
        )
        raise SystemExit(130) from None
    _headline(out, 4, "the result")
    raise SystemExit(_report(out, store, settings, run_id, history, data, crash))


def _headline(out: Console, number: int, text: str) -> None:
    out.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def _cache_dir() -> Path:
    """The user's cache of models and data: `$XDG_CACHE_HOME/sftd`, by default `~/.cache/sftd`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sftd"


def _make_data(folder: str, cache: Path) -> dict[str, Any]:
    """Chats from the standard library, tokenised for the model. Keys: train, val, summary, question, answer."""
    import msgspec

    from sftd.cli.submit.prepare import summary

    directory = cache / "demo" / Path(folder).name
    directory.mkdir(parents=True, exist_ok=True)
    run_with_bar("questions", "rows", ["stdlib-chats", str(directory)])
    lines = (directory / "val.jsonl").read_text().splitlines(keepends=True)
    (directory / "val-part.jsonl").write_text("".join(lines[:_VAL_ROWS]))
    done = {}
    for name, source in (("train", "train.jsonl"), ("val", "val-part.jsonl")):
        target = directory / f"{name}.parquet"
        options = ["--model", folder, "--out", str(target), "--max-length", "512"]
        done[name] = run_with_bar("tokenising", "rows", ["tokenize", str(directory / source), *options])
    # A question that training does not see, with a short answer that is easy to compare by eye.
    chats = [msgspec.json.decode(line)["messages"] for line in lines[:_VAL_ROWS]]
    question, answer = min(((c[0]["content"], c[1]["content"]) for c in chats), key=_plainness)
    return {
        "train": str(directory / "train.parquet"),
        "val": str(directory / "val.parquet"),
        "summary": f"train: {summary(done['train'])}; validation: {counted(done['val']['rows'], 'row')}",
        "question": question,
        "answer": answer,
    }


def _plainness(pair: tuple[str, str]) -> tuple[int, str]:
    # Prefer an answer of typical length: neither trivial nor truncated.
    return abs(len(pair[1].split()) - 9), pair[0]


def _show_row(out: Console, file: str, folder: str) -> None:
    """Print one row with its trained tokens marked."""
    from rich.padding import Padding
    from rich.text import Text

    from sftd.launcher.tools import run_tool

    row = run_tool("prepare", ["show", file, "--model", folder, "--row", "0"], lambda line: None)
    text = Text()
    for segment in row["segments"]:
        text.append(segment["text"], "bold black on green" if segment["trained"] else "dim")
    out.print(f"   one row: {counted(row['tokens'], 'token')}, the {row['trained']} marked ones are trained")
    out.print(Padding(text, (0, 0, 0, 6)))
    if not out.is_terminal:
        trained = "".join(s["text"] for s in row["segments"] if s["trained"])
        out.print(f"      (trained: {trained!r})", markup=False)


def _write_config(settings: Settings, folder: str, data: dict[str, Any], steps: int, *, lora: bool) -> Path:
    """The run's config, as a file that the user can read, change and submit again."""
    import yaml

    config = {
        "model": {"partial_pretrain": folder, **({"lora": {"rank": 16}} if lora else {})},
        "data": {
            "train_files": [data["train"]],
            "val_files": [data["val"]],
            "train_batch_size": 8,
            "sequence_length": 512,
        },
        "training": {"micro_batch_size_per_gpu": 8, "use_rmpad": True},
        # Adapters want about ten times the learning rate.
        "optimizer": {"lr": 1e-3 if lora else 1e-4, "weight_decay": 0.0},
        "scheduler": {"type": "cosine", "warmup_steps": 3, "min_lr_ratio": 0.1},
        "trainer": {
            "project_name": "demo",
            "experiment_name": "stdlib-docs",
            "max_steps": steps,
            "save_interval": _SAVE_INTERVAL,
            "sample_prompts": [data["question"]],
            "sample_max_tokens": 48,
        },
        "checkpoint": {"keep_last": 1, "keep_best": 0},
    }
    path = settings.home / "demo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _submit(store: Store, config: Path, home: Path) -> str:
    """Submit the config, as `sftd submit` does. Returns the run's id."""
    from sftd.operations.commands.submit import Wish, submit_all
    from sftd.wire import preflight
    from sftd.wire.spec import file as spec_file

    spec, warnings = spec_file.read(str(config), (), os.getcwd())
    found = preflight.inspect(spec, home=home)
    wish = Wish(spec, found, [*warnings, *found.warnings])
    return submit_all(store, app.context(), [wish], app.user_name())[0]


def _start_daemon(settings: Settings) -> None:
    """Start a daemon that ends when the queue is empty, unless one runs already."""
    from sftd.cli.daemon.command import start_detached
    from sftd.daemon import lock

    if lock.holder(settings.daemon_lock) is None:
        # The user watches: retry a crash after 1 s instead of 15 s.
        os.environ.setdefault("SFTD_BACKOFF_SECONDS", "1")
        start_detached(settings, drain=True, quiet=True)


def _follow(out: Console, store: Store, run_id: str, steps: int, crash_at: int | None) -> list[Recorded]:
    """Show progress until the run has ended, killing the ranks at `crash_at`. Returns the run's events."""
    from sftd.daemon.lock import holder
    from sftd.domain.errors import SftdError
    from sftd.domain.log import events as e
    from sftd.domain.run.state import ENDED
    from sftd.operations.queries import runs

    history: list[Recorded] = []
    settings = app.read_settings()
    with LiveSteps(out, steps) as live:
        while True:
            run = runs.find_run(store, run_id)
            for r in runs.run_events(store, run_id, len(history)):
                history.append(r)
                live.show(r)
                if crash_at is not None and isinstance(r.event, e.StepCompleted) and r.event.step >= crash_at:
                    live.say(_kill_ranks(history, r.event.step))
                    crash_at = None
            if run.status in ENDED and run.version <= len(history):
                return history
            if holder(settings.daemon_lock) is None and run.status not in ENDED:
                raise SftdError(
                    f"the daemon has ended, but {run_id} has not; see {settings.logs / 'daemon.log'}"
                )
            time.sleep(_POLL_SECONDS)


def _kill_ranks(history: list[Recorded], step: int) -> str:
    """SIGKILL the training ranks of the running attempt, as a power cut or the kernel's OOM killer would."""
    from sftd.domain.log import events as e
    from sftd.launcher import processes
    from sftd.wire.attempt.directory import AttemptDir

    launch = [r.event for r in history if isinstance(r.event, e.AttemptLaunched)][-1]
    pids = processes.ranks(AttemptDir(launch.directory).order().token).values()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return f"kill -9 {' '.join(map(str, pids))}   (the training ranks, after step {step})"


def _report(
    out: Console,
    store: Store,
    settings: Settings,
    run_id: str,
    history: list[Recorded],
    data: dict[str, Any],
    crash: bool,
) -> int:
    """Print losses, answers, redone steps, `sftd ls` and further commands. Returns the exit code."""
    from sftd.cli.terminal.run_table import runs_table
    from sftd.operations.queries import runs

    run = runs.find_run(store, run_id)
    if run.status != "succeeded":
        out.print(f"   [bold red]{run.status}[/]: {output.escape(f'{run.cause}: {run.message}')}")
        out.print(f"   sftd show {run_id}\n   sftd logs {run_id}")
        return 1
    out.print(f"   {validation_line(history)}")
    out.print(answers(history, data["question"], data["answer"]))
    if run.spec.model.lora.rank:
        _prove(out, settings, run_id, history)
    matches = True
    if crash:
        lines, matches = redone_lines(history)
        for text in lines:
            out.print(text, soft_wrap=True)
    click.echo()
    for line in runs_table(
        runs.list_runs(store, limit=5), app.context().now(), output.width(), colour=output.is_terminal()
    ):
        click.echo(line)
    click.echo()
    out.print("[bold]Look further[/]")
    if "SFTD_HOME" in os.environ:
        out.print(f"   export SFTD_HOME={settings.home}", soft_wrap=True)
    for arguments in (f"show {run_id}", f"events {run_id}", f"logs {run_id}", "ui"):
        out.print(f"   {_command()} {arguments}", soft_wrap=True)
    return 0 if matches else 1


def _prove(out: Console, settings: Settings, run_id: str, history: list[Recorded]) -> None:
    """Print the size of a checkpoint of adapters, export the last one, and prove it."""
    from sftd.cli.steer.export import export_command
    from sftd.domain.log import events as e

    saved = [r.event for r in history if isinstance(r.event, e.CheckpointPublished)][-1]
    _headline(out, 5, "the adapter, loaded by peft and compared with the trainer's model")
    out.print(
        f"   a checkpoint has {output.size(saved.bytes)}: adapters and optimizer, without the frozen model"
    )
    target = settings.home / "exports" / run_id
    target.parent.mkdir(exist_ok=True)
    context = click.get_current_context()
    context.invoke(export_command, run=run_id, directory=str(target), prove=True)


def _command() -> str:
    """The command that starts this sftd: its name if it is on the PATH, else its path."""
    beside = Path(sys.executable).with_name("sftd")
    found = shutil.which("sftd")
    if found and Path(found).resolve() == beside.resolve():
        return "sftd"
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)
