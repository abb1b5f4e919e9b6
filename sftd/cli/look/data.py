"""`sftd data`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftd.domain.run.state import Run
    from sftd.operations.queries.history import Chapter

# Characters shown of a row's text, and of one segment.
_TEXT, _PART = 80, 36


@click.command("data")
@click.argument("run")
@click.option("--step", type=click.IntRange(min=1), help="Show the rows that this step saw.")
@click.option(
    "--row", type=click.IntRange(min=0), help="Show the steps that saw this row (from 0, over all files)."
)
@click.option(
    "--text", is_flag=True, help="With --step: show each row as text, trained parts between « and »."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def data_command(run: str, step: int | None, row: int | None, text: bool, as_json: bool) -> None:
    """Show which rows of the training data a step of RUN saw, or which steps saw a row.

    The rows are computed from the data files and the seed, and checked against the log: their digest and trained tokens in
    every attempt that trained the step, and the digest of the files at submission. Exit code 1 if they do not match. Steps
    before a fork's first are its parent's; --row includes parents with the same files.

    \b
    Example:
      sftd data brave-otter --step 812
      sftd data brave-otter --step 812 --text
      sftd data brave-otter --row 4711
    """
    from sftd.operations.queries import history

    if (step is None) == (row is None):
        raise click.UsageError("Give either --step or --row.")
    if text and step is None:
        raise click.UsageError("--text needs --step.")
    store = app.open_store(app.read_settings())
    story = history.chapters(store, app.resolve_run(store, run))
    if step is not None:
        answer = _of_step(story, step, text=text)
    else:
        assert row is not None
        answer = _of_row(story, row)
    if as_json:
        click.echo(output.json_line(answer))
    elif step is not None:
        _print_rows(answer, text=text)
    else:
        _print_steps(answer)
    if answer["problems"]:
        sys.exit(1)


def _seen_rows(run: Run, *arguments: str) -> dict[str, Any]:
    from sftd.cli.order_file import order_file
    from sftd.cli.terminal.progress import run_with_stages
    from sftd.operations.queries import model_files

    settings = app.read_settings()
    # Only a text needs the tokenizer.
    text = "--text" in arguments
    model = ""
    if text:
        model = model_files.source(app.open_store(settings), settings.home, run, builds=False)
    with order_file(run, None, model) as order:
        found = run_with_stages(run.run_id, "seen_rows", [order, *arguments])
    return {name: value for name, value in found.items() if name != "event"}


def _changed_files(run: Run, found: dict[str, Any]) -> list[str]:
    if run.train_digest in ("", found["train_digest"]):
        return []
    return ["the data files changed since the submit: these are the current rows"]


def _of_step(story: list[Chapter], step: int, *, text: bool) -> dict[str, Any]:
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.log.events import StepCompleted
    from sftd.operations.queries.history import chapter_of_step

    chapter = chapter_of_step(story, step)
    run = chapter.run()
    if step > run.planned_steps:
        raise Refused(
            Problem("--step", f"{run.run_id} has {counted(run.planned_steps, 'step')}", "give one of them")
        )
    if step <= run.first_step:
        what = f"step {step} belongs to {run.fork.parent if run.fork else 'a parent'}, which is not in this database"
        raise Refused(Problem("--step", what, f"the run's own steps begin at {run.first_step + 1}"))
    # Positions by event version: a rollback skips samples, so a redone step may see other rows.
    recorded = [r for r in chapter.recorded if isinstance(r.event, StepCompleted) and r.event.step == step]
    positions = {r.version: chapter.run(r.version).sample_position(step - 1) for r in recorded}
    now = run.sample_position(step - 1)
    wanted = dict.fromkeys([now, *positions.values()])
    found = _seen_rows(run, "--at", *map(str, wanted), *(["--text"] if text else []))
    seen = {one["position"]: one for one in found.pop("seen")}
    attempts, problems = [], _changed_files(run, found)
    for r in recorded:
        assert isinstance(r.event, StepCompleted)
        computed = seen[positions[r.version]]
        agrees = r.event.samples_digest == computed["samples_digest"]
        is_shown = computed["position"] == now
        attempts.append({"attempt": r.attempt, "version": r.version, "agrees": agrees, "is_shown": is_shown})
        if not agrees:
            digest = r.event.samples_digest[:16]
            problems.append(f"attempt {r.attempt} recorded other rows: samples_digest {digest}")
        elif r.event.tokens != computed["tokens"]:
            trained = f"trained {counted(r.event.tokens, 'token')}, not {computed['tokens']}"
            problems.append(f"attempt {r.attempt} {trained}")
    return {
        "run_id": run.run_id,
        "step": step,
        **found,
        **seen[now],
        "attempts": attempts,
        "problems": problems,
    }


def _of_row(story: list[Chapter], row: int) -> dict[str, Any]:
    from sftd.domain.log.events import StepCompleted

    steps: list[dict[str, Any]] = []
    problems: list[str] = []
    others: list[str] = []
    found: dict[str, Any] = {}
    own = story[-1].run().train_digest
    for chapter in story:
        run = chapter.run()
        if run.train_digest != own:
            # There, this number means another row.
            others.append(run.run_id)
            continue
        last = run.planned_steps if chapter.last_step is None else chapter.last_step
        found = _seen_rows(
            run, "--row", str(row), "--after-step", str(run.first_step), "--last-step", str(last)
        )
        recorded = {r.event.step for r in chapter.recorded if isinstance(r.event, StepCompleted)}
        steps += [
            {"run_id": run.run_id, **step, "recorded": step["step"] in recorded} for step in found["steps"]
        ]
        problems += [f"{run.run_id}: {problem}" for problem in _changed_files(run, found)]
    return {
        "run_id": story[-1].run_id,
        **found,
        "steps": steps,
        "read_other_files": others,
        "problems": problems,
    }


def _print_rows(answer: dict[str, Any], *, text: bool) -> None:
    from rich.text import Text

    out = output.console()
    rows = answer["rows"]
    out.print(
        f"[bold]{answer['run_id']}[/], step {answer['step']}: {_counts(rows)}, {answer['tokens']} trained tokens",
        soft_wrap=True,
    )
    source = ["source"] if "source" in rows[0] else []
    names = ("row", "length", "trained", *source, "place", *(["text"] if text else []))
    table = output.table(*names, right=names[:3], dim=["place"], fold=["place", "text"])
    for row in rows:
        place = f"{row['file']}:{row['row_in_file']}"
        cells: list[Any] = [str(row["row"]), str(row["length"]), str(row["trained"])]
        cells += [*(Text(row[name]) for name in source), Text(place)]
        table.add_row(*cells, *([_marked(row["segments"])] if text else []))
    out.print(table)
    digest = answer["samples_digest"][:16]
    if not any(attempt["is_shown"] for attempt in answer["attempts"]):
        out.print("The log does not have this step yet. It will see these rows.")
    for attempt in answer["attempts"]:
        if attempt["agrees"] and attempt["is_shown"]:
            out.print(
                f"digest {digest} matches the log (attempt {attempt['attempt']}, v{attempt['version']})"
            )
        elif attempt["agrees"]:
            out.print(f"attempt {attempt['attempt']} saw other rows, which a rollback skipped")
    _print_problems(answer["problems"])


def _counts(rows: list[dict[str, Any]]) -> str:
    """The number of rows and their epochs, which each source of a mixture counts by itself."""
    by_source: dict[str, list[int]] = {}
    for row in rows:
        by_source.setdefault(row.get("source", ""), []).append(row["epoch"])
    return ", ".join(
        f"{counted(len(epochs), 'row')} of {f'{output.escape(source)}, ' if source else ''}"
        f"epoch {' and '.join(map(str, dict.fromkeys(epochs)))}"
        for source, epochs in by_source.items()
    )


def _marked(segments: list[dict[str, Any]]) -> Any:
    """The beginning of a row as text, trained parts in « ». Each part is shortened, so that both kinds are visible."""
    from rich.text import Text

    shown = Text()
    for segment in segments:
        part = " ".join(segment["text"].split())
        part = part if len(part) <= _PART else part[: _PART - 1] + "…"
        shown.append(f"«{part}»" if segment["trained"] else part, "green" if segment["trained"] else "dim")
        if len(shown) >= _TEXT:
            break
    return shown


def _print_steps(answer: dict[str, Any]) -> None:
    out = output.console()
    source = f" (source {output.escape(answer['source'])})" if "source" in answer else ""
    out.print(
        f"row {answer['row']} is row {answer['row_in_file']} of {output.escape(answer['file'])}{source}: "
        f"{counted(answer['length'], 'token')}, {answer['trained']} trained",
        soft_wrap=True,
    )
    if not answer["trained"]:
        out.print("It has no trained label, so no step sees it.")
    for line in _steps(answer):
        out.print(line, soft_wrap=True)
    for parent in answer["read_other_files"]:
        command = f"sftd data {parent} --row {answer['row']}"
        out.print(f"{parent}, its parent, read other files: see {command}", soft_wrap=True)
    _print_problems(answer["problems"])


def _steps(answer: dict[str, Any]) -> Iterator[str]:
    for step in answer["steps"]:
        owner = f" of {step['run_id']}" if step["run_id"] != answer["run_id"] else ""
        yield f"step {step['step']}{owner}, epoch {step['epoch']}" + (
            "" if step["recorded"] else ", not trained yet"
        )


def _print_problems(problems: list[str]) -> None:
    for problem in problems:
        output.console().print(f"[bold red]differs from the log[/]: {output.escape(problem)}", soft_wrap=True)
