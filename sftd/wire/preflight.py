"""Read a run's files at submit, before it holds a device. `domain/submit/judge.py` decides whether the run may be queued."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import sftd
from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Problem, Refused
from sftd.domain.log.events import RunSubmitted
from sftd.domain.model.files import ModelFiles
from sftd.domain.model.shape import ModelShape
from sftd.domain.run.decisions import Proposal
from sftd.domain.spec.data_section import Source
from sftd.domain.spec.spec import FROM_THE_BEGINNING, OrderStart, Spec, spec_digest
from sftd.domain.submit.facts import NOTHING, SaveFolder, SubmitFacts
from sftd.domain.submit.judge import judge
from sftd.wire.checkpoint import disk
from sftd.wire.data import chat_template, dataset
from sftd.wire.model import adapter as adapter_folder
from sftd.wire.model import digest as model_digest
from sftd.wire.model import folder as model_folder
from sftd.wire.model.same_files import shared


class Preflight(msgspec.Struct, frozen=True):
    """Facts about the files of an accepted run."""

    shape: ModelShape
    train: DataFacts
    val: DataFacts | None
    planned_steps: int
    warnings: list[Problem]
    model_files: ModelFiles | None = None
    template: ChatTemplate | None = None


def inspect(
    spec: Spec,
    start: Callable[[DataFacts], OrderStart] = lambda train: FROM_THE_BEGINNING,
    read: Callable[..., DataFacts] = dataset.inspect,
    *,
    known: SubmitFacts = NOTHING,
    home: Path | None = None,
    has_room: bool = True,
) -> Preflight:
    """Read the files of the spec and judge the run. `known` are facts from outside the files; they are judged before any file
    is read. Raises `Refused` with every problem found.

    `start`: see `judge`. `read` reads the data files. `home` is the daemon's home, where checkpoints are written without
    `checkpoint.save_dir`. `has_room` False skips the check of free space.
    """
    if problems := judge(spec, known).problems:
        raise Refused(problems)
    facts = _read(spec, read, known, _save_folder(spec, home, has_room=has_room))
    verdict = judge(spec, facts, start)
    if verdict.problems or facts.shape is None or facts.train is None or verdict.planned_steps is None:
        raise Refused(verdict.problems)
    return Preflight(
        facts.shape,
        facts.train,
        facts.val,
        verdict.planned_steps,
        verdict.warnings,
        facts.model_files,
        facts.template,
    )


def _read(
    spec: Spec, read: Callable[..., DataFacts], known: SubmitFacts, save_folder: SaveFolder | None
) -> SubmitFacts:
    unreadable: list[Problem] = []
    path, shape, model_files, has_tokenizer = spec.model.partial_pretrain, None, None, None
    try:
        shape = model_folder.read_shape(path, spec.model.override_config)
        model_folder.check_weights(path)
        has_tokenizer = model_folder.has_tokenizer(Path(path))
        model_files = model_digest.describe(path)
    except Refused as refused:
        unreadable += refused.problems

    adapter = None
    if spec.model.lora.adapter and not known.has_checkpoint:
        try:
            adapter = adapter_folder.read(spec.model.lora.adapter)
        except Refused as refused:
            unreadable += refused.problems

    def data(where: str, files: list[str], sources: Sequence[Source] = ()) -> DataFacts | None:
        try:
            return read(
                where,
                files,
                # Ids cannot be checked without a readable model, which is already reported.
                vocab_size=shape.vocab_size if shape else 2**31,
                sequence_length=spec.data.sequence_length,
                truncation=spec.data.truncation,
                stop_ids=model_folder.stop_ids(path) if shape else (),
                **({"sources": sources} if sources else {}),
            )
        except Refused as refused:
            unreadable.extend(refused.problems)
            return None

    sources = spec.data.sources
    train = data("data.sources" if sources else "data.train_files", spec.data.all_train_files, sources)
    val = data("data.val_files", spec.data.all_val_files) if spec.data.all_val_files else None
    return msgspec.structs.replace(
        known,
        unreadable=unreadable,
        shape=shape,
        model_files=model_files,
        has_tokenizer=has_tokenizer,
        adapter=adapter,
        train=train,
        val=val,
        trained_on=shared(train.files, val.files) if train and val else [],
        template=chat_template.of_files(train.files) if train else None,
        rendered_differently=chat_template.different(train.files) if train else None,
        save_folder=save_folder,
    )


def _save_folder(spec: Spec, home: Path | None, *, has_room: bool) -> SaveFolder | None:
    """Test by writing whether checkpoints can be written; None if no folder is known."""
    named = spec.checkpoint.save_dir
    root = Path(named) if named else home
    if root is None:
        return None
    folder = root if named else root / "runs"
    try:
        unmounted = disk.looks_unmounted(folder) if named else None
        disk.probe(folder)
        above = disk.nearest(root)
        free = shutil.disk_usage(above).free if has_room else None
    except (OSError, ValueError) as error:
        return SaveFolder(path=str(folder), error=str(getattr(error, "strerror", None) or error))
    return SaveFolder(path=str(folder), unmounted=str(unmounted or ""), above=str(above), free=free)


def proposal(spec: Spec, found: Preflight) -> Proposal:
    """The facts that a decision on another spec of a run needs."""
    val_digest = found.val.digest if found.val else ""
    return Proposal(spec, found.planned_steps, found.train.digest, val_digest, found.train.sources)


def submission(spec: Spec, found: Preflight, warnings: list[Problem], user: str) -> RunSubmitted:
    """The event that begins a run: its spec, and the facts about its files."""
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
