"""Everything that can be found wrong with a run before a device is held: reads the model's and the data's files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

import sftd
from sftd.domain.chat_template import ChatTemplate
from sftd.domain.decisions import Proposal
from sftd.domain.errors import Problem, Refused
from sftd.domain.events import RunSubmitted
from sftd.domain.layout import DataFacts, ModelShape, check_data, check_model
from sftd.domain.spec import FROM_THE_BEGINNING, OrderStart, Spec, spec_digest
from sftd.wire import chat_template, dataset, model_folder


class Preflight(msgspec.Struct, frozen=True):
    """What submit found in the files of a run that is not refused."""

    shape: ModelShape
    train: DataFacts
    val: DataFacts | None
    planned_steps: int
    warnings: list[Problem]
    template: ChatTemplate | None = None


def _check_save_dir(spec: Spec) -> list[Problem]:
    """That checkpoints can be written: found out now and not at the first save."""
    if not spec.checkpoint.save_dir:
        return []
    where, fix = "checkpoint.save_dir", "give a folder that you may write to"
    if "\0" in spec.checkpoint.save_dir:
        return [Problem(where, f"{spec.checkpoint.save_dir!r} holds a NUL character", fix)]
    try:
        path = Path(spec.checkpoint.save_dir)
        nearest = next(p for p in (path, *path.parents) if p.exists())
        writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    except (OSError, ValueError) as error:
        return [Problem(where, f"{spec.checkpoint.save_dir!r}: {error}", fix)]
    return [] if writable else [Problem(where, f"{nearest} is not a folder that can be written to", fix)]


def inspect(
    spec: Spec,
    start: Callable[[str], OrderStart] = lambda train_digest: FROM_THE_BEGINNING,
    read: Callable[..., DataFacts] = dataset.inspect,
) -> Preflight:
    """Read the files that the spec names. `start` says, given the digest of the training data, where the run begins to
    read it; `read` reads the files of the data. Raises `Refused` with every problem found."""
    problems = _check_save_dir(spec)
    warnings: list[Problem] = []
    shape = None
    try:
        shape = model_folder.read_shape(spec.model.partial_pretrain, spec.model.override_config)
        model_folder.check_weights(spec.model.partial_pretrain)
        if spec.trainer.sample_prompts:
            model_folder.check_tokenizer(spec.model.partial_pretrain)
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
    planned = spec.planned_steps(train.usable, start(train.digest))
    if spec.warmup_steps(planned) > planned:
        raise Refused(
            Problem(
                "scheduler.warmup_steps",
                f"{spec.scheduler.warmup_steps} is more than the {planned} steps of the run",
                "warm up for fewer steps",
            )
        )
    template = chat_template.of_files(spec.data.train_files)
    return Preflight(shape, train, val, planned, warnings, template=template)


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
    )
