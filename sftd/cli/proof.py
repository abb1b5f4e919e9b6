"""The proof of an export: the model that was written computes what the trainer's does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftd.cli.terminal import output
from sftd.cli.terminal.progress import run_with_stages
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from sftd.domain.log.events import ExportDiverged, ExportProven, ModelExported
    from sftd.domain.run.state import CheckpointInfo, Run


class Proof:
    """Two processes: one computes recorded rows with the trainer's model, the other loads the export as its users do."""

    def __init__(self, run: Run, checkpoint: CheckpointInfo, order: str, folder: str, *, merge: bool) -> None:
        """Compute with the trainer's model, before anything is exported. `order`: of an attempt of `run`; `folder`: for
        temporary files; `merge`: as for the export. Raises `Refused` if the rows are not those that the run trained on, `ToolFailed` if there are none."""
        from sftd.domain.errors import Problem, Refused

        if run.spec.model.quantize != "none" and not merge:
            said = "The proof loads the model as its folder has it"
            output.note(f"{said}; the run trained beside it in {run.spec.model.quantize}.")
        self._title = f"{run.run_id}, step {checkpoint.step}"
        self._file = str(Path(folder) / "reference.safetensors")
        # A fork's first row.
        position = run.sample_position(run.first_step)
        arguments = [order, checkpoint.path, self._file, "--position", str(position)]
        arguments += ["--digest", checkpoint.manifest_digest, *(["--merge"] if merge else [])]
        done = run_with_stages(self._title, "export.reference", arguments)
        if run.train_digest not in ("", done["train_digest"]):
            what = "the files changed since the submit, so their rows are not those of the run"
            raise Refused(Problem("data.train_files", what, "put them back, or leave out --prove"))

    def of(self, exported: ModelExported) -> ExportProven | ExportDiverged:
        """Compare an export with the trainer's model."""
        from sftd.domain.log.events import ExportDiverged, ExportProven

        done = run_with_stages(self._title, "export.prove", [exported.path, self._file])
        largest, tolerance = float(done["largest_difference"]), float(done["tolerance"])
        facts: dict[str, Any] = {
            name: done[name] for name in ("rows", "positions", "rounding", "tokens", "versions")
        }
        facts |= {"step": exported.step, "path": exported.path, "digest": exported.digest}
        facts |= {"largest_difference": largest, "tolerance": tolerance}
        # No comparison with NaN is true.
        if largest <= tolerance and not done["other_token"]:
            return ExportProven(**facts)
        return ExportDiverged(**facts, other_token=done["other_token"])


def show(found: ExportProven | ExportDiverged, *, quiet: bool = False) -> None:
    """Print what a proof found, unless `quiet`. Raises `SftdError` for an export that computes something else."""
    from sftd.domain.errors import SftdError
    from sftd.domain.log.events import ExportDiverged

    versions = " and ".join(
        f"{name} {version}" for name, version in found.versions.items() if name != "torch"
    )
    rows = f"{counted(found.rows, 'recorded row')}, {counted(found.positions, 'position')}"
    limit = f"tolerance {found.tolerance:.1e}, the rounding of {found.rounding}"
    if isinstance(found, ExportDiverged):
        logits = f"logits differ by up to {found.largest_difference:.1e} ({limit})"
        what = "; ".join(filter(None, [logits, found.other_token]))
        raise SftdError(
            f"{found.path} is not what was trained: loaded with {versions}, on {rows}: {what}\n"
            "    fix: do not use it. If nothing changed the folder, this is a defect of sftd: please report it"
        )
    if quiet:
        return
    click.echo(f"proven with {versions} on {rows}:")
    click.echo(f"  largest difference of a logit {found.largest_difference:.1e} ({limit})")
    click.echo(f"  {counted(found.tokens, 'token')} of answers compared, all equal")
