"""`sftd export`."""

from __future__ import annotations

import os
import tempfile

import click

from sftd.cli import app
from sftd.cli.terminal import output


@click.command("export")
@click.argument("run")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--step", type=click.IntRange(min=1), help="Export this step's checkpoint; the last if not given."
)
@click.option(
    "--merge", is_flag=True, help="Write the whole model with its adapters merged, not a PEFT folder."
)
@click.option("--prove", is_flag=True, help="Load what was written, and compare it with the trainer's model.")
@click.option("--register", "name", metavar="NAME", help="Also make it a version of this model in MLflow.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export_command(
    run: str, directory: str, step: int | None, merge: bool, prove: bool, name: str | None, as_json: bool
) -> None:
    """Write the model of a published checkpoint of RUN to DIR, as a Hugging Face folder.

    Weights (safetensors), config and tokenizer, whatever layout the run was trained in. A run with model.lora gives a
    PEFT folder, or with --merge the whole model. The checkpoint is verified first; DIR must be new or empty. With
    --register a copy goes into MLflow's model registry.

    --prove loads the folder with transformers (and peft) in a process of its own. On rows of the run's data, logits must equal
    those of the trainer's model to within rounding, and greedy answers must have the same tokens. Both compute in FP32 on the
    CPU: 4 bytes of memory a parameter, one after the other. The log records the result; exit code 1 if anything differs.

    \b
    Example:
      sftd export brave-otter ./my-model
      sftd export brave-otter ./my-model --step 100
      sftd export brave-otter ./my-model --merge
      sftd export brave-otter ./my-model --prove
      sftd export brave-otter ./my-model --register support
    """
    import msgspec

    from sftd.cli import proof
    from sftd.cli.model_registry import Registry
    from sftd.cli.order_file import order_file
    from sftd.cli.terminal.progress import run_with_stages
    from sftd.domain.errors import Problem, Refused
    from sftd.domain.log.events import ModelExported
    from sftd.operations.driving import checkpoints
    from sftd.operations.queries import model_files

    settings = app.read_settings()
    store = app.open_store(settings)
    found, checkpoint = checkpoints.find(store, app.resolve_run(store, run), step)
    path = os.path.abspath(directory)
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise Refused(Problem("DIR", f"{path} exists already", "give a folder that is new or empty"))
    output.require_folder("DIR", path)
    if merge and not found.spec.model.lora.rank:
        what = f"{found.run_id} has no adapters to merge: it trained the model's own weights"
        raise Refused(Problem("--merge", what, "leave it out"))
    # These may refuse, so they come before the work.
    model = model_files.source(store, settings.home, found)
    registry = Registry(settings, store, found.run_id, name) if name is not None else None
    template = checkpoints.chat_template(store, found.run_id)
    output.when_interrupted(f"Nothing was written to {path}.")
    with (
        order_file(found, checkpoint, model, template) as order,
        tempfile.TemporaryDirectory(prefix="sftd-") as folder,
    ):
        proving = proof.Proof(found, checkpoint, order, folder, merge=merge) if prove else None
        arguments = [order, checkpoint.path, path, "--digest", checkpoint.manifest_digest]
        arguments += ["--merge"] if merge else []
        done = run_with_stages(f"{found.run_id}, step {checkpoint.step}", "export", arguments)
        exported = ModelExported(
            step=checkpoint.step, path=path, bytes=done["bytes"], digest=done["digest"], dtype=done["dtype"]
        )
        output.when_interrupted(f"The model is in {path}.")
        checkpoints.record_export(store, app.context(), found.run_id, exported)
        if not as_json:
            click.echo(f"wrote {path}: {output.size(exported.bytes)}, {exported.dtype}")
        proven = proving.of(exported) if proving is not None else None
    if proven is not None:
        checkpoints.record_export(store, app.context(), found.run_id, proven)
        proof.show(proven, quiet=as_json)
    version = registry.register(exported) if registry is not None else None
    if as_json:
        fields = {"run_id": found.run_id, "step": exported.step, "path": path, "bytes": exported.bytes}
        fields |= {"digest": exported.digest, "dtype": exported.dtype}
        fields |= {"proof": msgspec.to_builtins(proven)} if proven is not None else {}
        registered = {"registered": {"name": name, "version": version}} if version is not None else {}
        click.echo(output.json_line(fields | registered))
    elif version is not None:
        click.echo(f"registered as {name} version {version}")
