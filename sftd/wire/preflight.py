"""Everything that can be found wrong with a run before a device is held: reads the model's and the data's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

import sftd
from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.errors import Problem, Refused
from sftd.domain.log.events import RunSubmitted
from sftd.domain.model.checks import DataFacts, check_data, check_model
from sftd.domain.model.files import ModelFiles
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.disk import storage
from sftd.domain.plan.warnings import doubts
from sftd.domain.run.decisions import Proposal
from sftd.domain.spec.spec import FROM_THE_BEGINNING, OrderStart, Spec, spec_digest
from sftd.domain.text.words import size
from sftd.wire.checkpoint import disk
from sftd.wire.data import chat_template, dataset
from sftd.wire.model import digest as model_digest
from sftd.wire.model import folder as model_folder
from sftd.wire.model.same_files import shared

_SAVE_DIR = "checkpoint.save_dir"


class Preflight(msgspec.Struct, frozen=True):
    """What submit found in the files of a run that is not refused."""

    shape: ModelShape
    train: DataFacts
    val: DataFacts | None
    planned_steps: int
    warnings: list[Problem]
    model_files: ModelFiles | None = None
    template: ChatTemplate | None = None


def _check_folder(spec: Spec, home: Path | None) -> tuple[list[Problem], list[Problem]]:
    """That checkpoints can be written, by writing: found out now and not at the first save. Returns what is wrong, and what is
    doubtful."""
    where, named = _SAVE_DIR, spec.checkpoint.save_dir
    folder = Path(named) if named else home / "runs" if home else None
    if folder is None:
        return [], []
    fix = (
        "give a folder that you may write to" if named else "set SFTD_HOME to a folder that you may write to"
    )
    if "\0" in named:
        return [Problem(where, f"{named!r} holds a NUL character", fix)], []
    try:
        unmounted = disk.looks_unmounted(folder) if named else None
        disk.probe(folder)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return [Problem(where, f"{str(folder)!r} cannot be written to: {why}", fix)], []
    if unmounted is None:
        return [], []
    what = f"{folder} and folders above it are missing in {unmounted}, which is on the root file system"
    return [], [Problem(where, what, "mount the disk first, if it should be on one")]


def check_space(
    spec: Spec, shape: ModelShape, planned: int, first: int, home: Path | None
) -> tuple[list[Problem], list[Problem]]:
    """That the checkpoints fit on the disk: one at least, else it is wrong; the plan's peak, else it is doubtful."""
    named = spec.checkpoint.save_dir or home
    if not named:
        return [], []
    dtype = spec.model.megatron.params_dtype
    # With `auto` the device decides; in float32 a checkpoint is the smallest.
    need = storage(spec, shape, planned, "float32" if dtype == "auto" else dtype, first)
    above = disk.nearest(Path(named))
    free = shutil.disk_usage(above).free
    said = f"{size(free)} are free in {above}"
    fix = "make room, or name a folder on another disk: checkpoint.save_dir"
    if free < need.one_save:
        return [Problem(_SAVE_DIR, f"{said}, but one checkpoint needs {size(need.one_save)}", fix)], []
    if free < need.needed:
        what = f"{said}, but the run's checkpoints take up to {size(need.needed)} at a time"
        return [], [
            Problem(_SAVE_DIR, what, f"{fix}; or keep fewer (checkpoint.keep_last, keep_best, keep_every)")
        ]
    return [], []


def inspect(
    spec: Spec,
    start: Callable[[str], OrderStart] = lambda train_digest: FROM_THE_BEGINNING,
    read: Callable[..., DataFacts] = dataset.inspect,
    *,
    home: Path | None = None,
    has_room: bool = True,
) -> Preflight:
    """Read the files that the spec names. `start` says, given the digest of the training data, where the run begins to
    read it; `read` reads the files of the data. `home` is that of the daemon, where checkpoints go that the spec names no folder
    for; without `has_room` nobody asks whether they fit. Raises `Refused` with every problem found."""
    problems, warnings = _check_folder(spec, home)
    shape = None
    try:
        shape = model_folder.read_shape(spec.model.partial_pretrain, spec.model.override_config)
        model_folder.check_weights(spec.model.partial_pretrain)
        warnings += model_folder.check_tokenizer(
            spec.model.partial_pretrain, is_needed=bool(spec.trainer.sample_prompts)
        )
    except Refused as refused:
        problems += refused.problems
    if shape is not None:
        wrong, doubtful = check_model(spec, shape)
        problems += wrong
        warnings += doubtful
    found: dict[str, DataFacts] = {}
    for where, files in (
        ("data.train_files", spec.data.train_files),
        ("data.val_files", spec.data.val_files),
    ):
        if not files:
            continue
        try:
            found[where] = read(
                where,
                files,
                # Without a readable model the ids cannot be checked; its problem is told already.
                vocab_size=shape.vocab_size if shape else 2**31,
                sequence_length=spec.data.sequence_length,
                truncation=spec.data.truncation,
                stop_ids=model_folder.stop_ids(spec.model.partial_pretrain) if shape else (),
            )
        except Refused as refused:
            problems += refused.problems
    train, val = found.get("data.train_files"), found.get("data.val_files")
    if train is not None:
        wrong, doubtful = check_data(spec, train, val)
        problems += wrong
        warnings += doubtful
        warnings += chat_template.warnings("data.train_files", spec.data.train_files)
    if problems or shape is None or train is None:
        raise Refused(problems)
    beginning = start(train.digest)
    planned = spec.planned_steps(train.usable, beginning)
    if spec.warmup_steps(planned) > planned:
        raise Refused(
            Problem(
                "scheduler.warmup_steps",
                f"{spec.scheduler.warmup_steps} is more than the {planned} steps of the run",
                "warm up for fewer steps",
            )
        )
    if has_room:
        wrong, doubtful = check_space(spec, shape, planned, beginning.step, home)
        if wrong:
            raise Refused(wrong)
        warnings += doubtful
    warnings += doubts(spec, train, val, shared(train.files, val.files) if val else [], planned)
    model_files = model_digest.describe(spec.model.partial_pretrain)
    template = chat_template.of_files(spec.data.train_files)
    return Preflight(shape, train, val, planned, warnings, model_files, template)


def proposal(spec: Spec, found: Preflight) -> Proposal:
    """What a decision on another spec of a run needs to know of it."""
    return Proposal(spec, found.planned_steps, found.train.digest, found.val.digest if found.val else "")


def submission(spec: Spec, found: Preflight, warnings: list[Problem], user: str) -> RunSubmitted:
    """The event that begins a run: what was asked for, and what was found in its files."""
    return RunSubmitted(
        spec=msgspec.to_builtins(spec),
        spec_digest=spec_digest(spec),
        planned_steps=found.planned_steps,
        user=user,
        data={
            "train": msgspec.to_builtins(found.train),
            "val": msgspec.to_builtins(found.val) if found.val else None,
            **({"template": msgspec.to_builtins(found.template)} if found.template else {}),
        },
        model={"path": spec.model.partial_pretrain, **msgspec.to_builtins(found.shape)},
        sftd_version=sftd.__version__,
        warnings=[str(w) for w in warnings],
        model_files=found.model_files,
    )
