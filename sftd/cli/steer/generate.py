"""`sftd generate`."""

from __future__ import annotations

import sys

import click

from sftd.cli import app
from sftd.cli.terminal import output
from sftd.domain.text.words import counted


@click.command("generate")
@click.argument("run")
@click.option(
    "--step", type=click.IntRange(min=1), help="Answer from this step's checkpoint; the last if not given."
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="Prompt to answer; repeatable; - reads stdin.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Maximum length of an answer.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to compute on; auto uses a GPU if there is one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of answers.")
def generate_command(
    run: str, step: int | None, prompts: tuple[str, ...], max_tokens: int, device: str, as_json: bool
) -> None:
    """Answer prompts from a published checkpoint of RUN, greedily, each as a user's message in the chat template.

    The checkpoint is verified first. Answers go to stdout, everything else to stderr.

    \b
    Example:
      sftd generate brave-otter --prompt "What is the capital of France?"
      sftd generate brave-otter --step 100 --prompt - --max-tokens 64 < question.txt
    """
    import msgspec

    from sftd.cli.order_file import order_file
    from sftd.cli.terminal.progress import run_with_stages
    from sftd.operations.driving import checkpoints
    from sftd.operations.queries import model_files

    settings = app.read_settings()
    store = app.open_store(settings)
    found, checkpoint = checkpoints.find(store, app.resolve_run(store, run), step)
    if list(prompts).count("-") > 1:
        raise click.UsageError("Only one --prompt can be read from stdin.")
    texts = [sys.stdin.read().strip() if prompt == "-" else prompt for prompt in prompts]
    if not all(text.strip() for text in texts):
        raise click.UsageError("A --prompt is empty.")
    model = model_files.source(store, settings.home, found)
    template = checkpoints.chat_template(store, found.run_id)
    output.when_interrupted("Nothing was written.")
    with order_file(found, checkpoint, model, template) as order:
        arguments = [order, checkpoint.path, "--digest", checkpoint.manifest_digest]
        arguments += ["--device", device, "--max-tokens", str(max_tokens)]
        title = f"{found.run_id}, step {checkpoint.step}"
        done = run_with_stages(title, "answer", arguments, msgspec.json.encode(texts))
    answers = done["answers"]
    if as_json:
        click.echo(output.json_line(answers))
        return
    for i, answer in enumerate(answers):
        if len(answers) > 1:
            click.echo(click.style(f"{'' if i == 0 else chr(10)}> {answer['prompt']}", dim=True))
        click.echo(answer["text"])
        if not answer["stopped"]:
            output.note(f"(cut after {counted(answer['tokens'], 'token')}; --max-tokens allows more)")
