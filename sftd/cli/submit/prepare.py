"""`sftd prepare`."""

from __future__ import annotations

import os
from typing import Any

import click

from sftd.cli.terminal import output
from sftd.cli.terminal.types import FiniteRange
from sftd.domain.text.words import counted

# Options that the tool has under the same name.
_PASSED = (
    "max_length",
    "truncation",
    "messages_key",
    "prompt_key",
    "response_key",
    "split",
    "val_fraction",
    "val_rows",
    "val_split",
    "val_out",
    "rewritten",
    "workers",
    "chat_template",
    "template",
    "date",
)


@click.command("prepare")
@click.argument("sources", nargs=-1, required=True, type=click.Path())
@click.option(
    "-m",
    "--model",
    required=True,
    type=click.Path(),
    help="Model folder whose tokenizer and template are used.",
)
@click.option("-o", "--out", required=True, type=click.Path(), help="Parquet file to write.")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Longest row in tokens; unlimited when not given."
)
@click.option(
    "--truncation",
    type=click.Choice(["right", "left", "error", "drop"]),
    default="right",
    show_default=True,
    help="Treatment of longer rows.",
)
@click.option(
    "--messages-key", help="Field or column that holds the chat, when it has none of the usual names."
)
@click.option("--prompt-key", help="Field or column that holds the prompt; with --response-key.")
@click.option("--response-key", help="Field or column that holds the response; with --prompt-key.")
@click.option("--split", default="train", show_default=True, help="Split of a data set folder to read.")
@click.option(
    "--val-fraction",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    help="Share of the chats split off for validation.",
)
@click.option(
    "--val-rows", type=click.IntRange(min=1), help="Number of rows for validation, instead of a share."
)
@click.option("--val-split", help="Split of the data set folder to use for validation, instead of a share.")
@click.option(
    "--val-out",
    type=click.Path(),
    help="Parquet file for the validation rows; by default OUT with .val in its name.",
)
@click.option(
    "--rewritten",
    type=click.Choice(["refuse", "mask", "split"]),
    default="refuse",
    show_default=True,
    help="Treatment of answers that the template rewrites when turns follow: refuse the row, mask them, or train each in its own row.",
)
@click.option("--skip-bad-rows", is_flag=True, help="Leave out and count rows that cannot be used.")
@click.option(
    "--dedupe",
    is_flag=True,
    help="Leave out chats that repeat an earlier one in all but case and whitespace.",
)
@click.option(
    "--against",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="File of validation chats, or of an evaluation's questions, to find in the training rows.",
)
@click.option(
    "--drop-overlap",
    is_flag=True,
    help="Leave out training rows whose chat or user messages the validation data has.",
)
@click.option(
    "--template-arg",
    multiple=True,
    metavar="NAME=VALUE",
    help="Variable for the chat template, such as enable_thinking=false.",
)
@click.option(
    "--chat-template",
    type=click.Path(),
    help="Jinja file to use instead of the model's chat template; a base model has none.",
)
@click.option("--template", metavar="NAME", help="Use the model's chat template of this name.")
@click.option(
    "--date",
    metavar="YYYY-MM-DD",
    help="Current date for the chat template; 2024-07-26 when not given.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes; by default one a core for large files."
)
@click.option("--trust-remote-code", is_flag=True, help="Allow the tokenizer's own code to run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prepare_command(
    sources: tuple[str, ...],
    model: str,
    out: str,
    skip_bad_rows: bool,
    dedupe: bool,
    against: tuple[str, ...],
    drop_overlap: bool,
    template_arg: tuple[str, ...],
    trust_remote_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn chats into tokenised Parquet: `input_ids`, `attention_mask`, `labels`.

    SOURCES are files (.jsonl, .json, .csv, also with .gz; .parquet) or Hugging Face data set folders, with messages,
    conversations, prompt and completion, or instruction and output. The model's chat template is applied. The assistant's answers and
    their stop tokens are trained; everything else is masked with -100. A card beside the file records options and counts.

    \b
    Example:
      sftd prepare chats.jsonl -m ./SmolLM2 -o train.parquet --val-fraction 0.05 --val-out val.parquet
      sftd prepare ./my-dataset -m ./Qwen3-8B -o train.parquet --rewritten split --max-length 4096
    """
    from sftd.cli.terminal.progress import run_with_bar
    from sftd.wire.spec.paths import model_folder

    ways = [options["val_fraction"], options["val_rows"], options["val_split"]]
    if options["val_out"] is not None and not any(way is not None for way in ways):
        raise click.UsageError("--val-out needs one of --val-fraction, --val-rows and --val-split.")
    if options["chat_template"] is not None and options["template"] is not None:
        raise click.UsageError("Use either --chat-template or --template.")
    if (options["prompt_key"] is None) != (options["response_key"] is None):
        raise click.UsageError("Use --prompt-key and --response-key together.")
    output.require_folder("--out", out)
    if options["val_out"] is not None:
        output.require_folder("--val-out", options["val_out"])
    folder = model_folder("--model", model, os.getcwd())
    arguments = [*sources, "--model", folder, "--out", out]
    for name in _PASSED:
        if options[name] is not None:
            arguments += [f"--{name.replace('_', '-')}", str(options[name])]
    for text in template_arg:
        arguments += ["--template-arg", text]
    for path in against:
        arguments += ["--against", path]
    if skip_bad_rows:
        arguments.append("--skip-bad-rows")
    if dedupe:
        arguments.append("--dedupe")
    if drop_overlap:
        arguments.append("--drop-overlap")
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    output.when_interrupted("Nothing was written.")
    done = run_with_bar("tokenising", "rows", ["tokenize", *arguments])
    if as_json:
        click.echo(output.json_line(done))
        return
    for warning in done.get("warnings", []):
        output.warn(str(warning))
    click.echo(summary(done))
    if val := done.get("val"):
        click.echo(f"for validation: {summary(val)}")
    for path in (done["path"], *([val["path"]] if val else []), done["card_text"]):
        click.echo(f"wrote {path}")


def summary(done: dict[str, Any]) -> str:
    """The result of `tokenize` in one line."""
    share = done["trained_tokens"] / max(1, done["tokens"])
    text = f"{counted(done['rows'], 'row')}, {counted(done['tokens'], 'token')}, of which {share:.0%} are trained"
    if done.get("truncated"):
        text += f"; {done['truncated']:,} truncated"
    if done.get("dropped"):
        text += f"; {done['dropped']:,} dropped"
    if done.get("rejected"):
        text += f"; {done['rejected']:,} rejected"
    return text
