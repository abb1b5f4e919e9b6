"""Rules of a fork: its spec must fit the model and the checkpoint of its parent."""

from __future__ import annotations

import json
from collections.abc import Iterator

from sftd.domain.errors import Problem
from sftd.domain.model.files import ModelFiles
from sftd.domain.model.rules import changed_files
from sftd.domain.model.shape import ModelShape, recorded_shape
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec
from sftd.domain.submit.facts import Parent, SubmitFacts

# Fields of a model's shape that do not affect its parameters.
_FREE_SHAPE = frozenset(
    {
        *("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
        *("sliding_window", "layers_without_window", "unsupported"),
    }
)


def _changed(spec: Spec, facts: SubmitFacts, parent: Parent, fix: str) -> list[Problem]:
    weights = parent.checkpoint is None
    return changed_files(
        parent.model_files, facts.model_files, spec, weights=weights, fix=fix, run=parent.run_id
    )


def changed_model_folder(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The model folder must not have changed since the parent was submitted."""
    if (parent := facts.parent) and not parent.may_change_files:
        fix = "put the folder back as it was, or add --changed-model to use it as it is now"
        yield from _changed(spec, facts, parent, fix)


def other_model_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A checkpoint contains the parameters of the parent's model."""
    if (parent := facts.parent) and parent.checkpoint is not None and facts.shape is not None:
        was = recorded_shape(parent.model)
        for key in sorted({*ModelShape.__struct_fields__} - _FREE_SHAPE):
            if getattr(facts.shape, key) != getattr(was, key):
                what = f"has {key} {getattr(facts.shape, key)!r}, but the checkpoint is of a model with {getattr(was, key)!r}"
                fix = "a fork must use its parent's model; submit a new run for another model"
                yield Problem("model.partial_pretrain", what, fix)


def other_dtype_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A fork must use the dtype in which its checkpoint was trained."""
    wanted = spec.model.megatron.params_dtype
    if (parent := facts.parent) and parent.dtype and wanted not in ("auto", parent.dtype):
        what = f"is {wanted}, but the checkpoint of step {parent.checkpoint} was trained in {parent.dtype}"
        fix = f"leave it at auto, or set it to {parent.dtype}"
        yield Problem("model.megatron.params_dtype", what, fix)


def _partly_frozen(facts: SubmitFacts) -> Parent | None:
    """The parent, if the fork starts from a checkpoint that holds only the weights that the parent trained."""
    parent = facts.parent
    return parent if parent and parent.checkpoint is not None and parent.spec.model.is_partly_frozen else None


def _weights(files: ModelFiles) -> list[str]:
    return sorted(file.sha256 for file in files.weights.values())


def other_base_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """What a checkpoint does not hold must be what it was trained with."""
    parent = _partly_frozen(facts)
    if parent is None:
        return
    own, holds = parent.spec.model, "holds only what was trained beside them"
    where = f"the checkpoint of step {parent.checkpoint}"
    is_same = spec.model.partial_pretrain == own.partial_pretrain
    if facts.model_files and parent.own_files and _weights(facts.model_files) != _weights(parent.own_files):
        what = f"{spec.model.partial_pretrain} has other weights than {parent.run_id} started from, and {where} {holds}"
        put, changed = (
            ("put them back as they were", " --changed-model") if is_same else ("use its folder", "")
        )
        yield Problem("model.partial_pretrain", what, f"{put}, or start again with --from-step 0{changed}")
    if spec.model.override_config != own.override_config:
        what = f"differs from {parent.run_id}'s, and {where} {holds}"
        yield Problem("model.override_config", what, "leave it as it was, or start again with --from-step 0")


def other_adapters_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A checkpoint holds either a model or adapters of one rank, for some projections of one model."""
    parent = facts.parent
    if parent is None or parent.checkpoint is None:
        return
    lora, own, step = spec.model.lora, parent.spec.model.lora, parent.checkpoint
    if not lora.rank or not own.rank:
        if lora.rank != own.rank:
            of = f"of adapters of rank {own.rank}" if own.rank else "without adapters"
            what = f"is {lora.rank}, but the checkpoint of step {step} is {of}"
            yield Problem("model.lora.rank", what, _from_export(parent, own.rank))
        return
    same = {
        "rank": (own.rank, lora.rank),
        "targets": (list(own.projections), list(lora.projections)),
        "rslora": (own.rslora, lora.rslora),
    }
    for name, (was, now) in same.items():
        if was != now:
            what = (
                f"is {json.dumps(now)}, but the checkpoint of step {step} has adapters with {json.dumps(was)}"
            )
            yield Problem(f"model.lora.{name}", what, _from_export(parent, own.rank))
    for name in ("adapter", "init"):
        if getattr(lora, name) != getattr(own, name):
            what = f"is not read: the fork starts from the checkpoint of step {step}"
            yield Problem(f"model.lora.{name}", what, "leave it as it was, or start again with --from-step 0")


def other_frozen_weights_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A checkpoint lacks frozen weights. Those that are frozen later would be read from the model folder, untrained."""
    parent = facts.parent
    if parent is None or parent.checkpoint is None:
        return
    own = parent.spec.model
    of_step = f"the checkpoint of step {parent.checkpoint}"
    if set(spec.model.freeze) != set(own.freeze):
        frozen = f"without {json.dumps(own.freeze)}" if own.freeze else "with all weights"
        what = f"is {json.dumps(spec.model.freeze)}, but {of_step} is {frozen}"
        yield Problem("model.freeze", what, _from_export(parent, own.lora.rank))
    if spec.model.freeze_router != own.freeze_router:
        what = f"{json.dumps(spec.model.freeze_router)}, but {json.dumps(own.freeze_router)} in {of_step}"
        yield Problem("model.freeze_router", what, _from_export(parent, own.lora.rank))
    if spec.model.quantize != own.quantize and spec.model.lora.rank and own.lora.rank:
        what = f"is {spec.model.quantize}, but the adapters of step {parent.checkpoint} were trained with {own.quantize}"
        yield Problem("model.quantize", what, _from_export(parent, own.lora.rank))


def _from_export(parent: Parent, rank: int) -> str:
    export = f"sftd export {parent.run_id} DIR --step {parent.checkpoint}{' --merge' if rank else ''}"
    return (
        f"leave it as it was; or submit a new run from an export: `{export}`, then model.partial_pretrain=DIR"
    )


def other_precision_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A lean optimizer's checkpoint has no FP32 weights, and BF16 moments."""
    wanted, parent = spec.optimizer.precision, facts.parent
    if parent and parent.checkpoint is not None and wanted != (own := parent.spec.optimizer.precision):
        what = f"is {wanted}, but the checkpoint of step {parent.checkpoint} was trained with {own}"
        yield Problem("optimizer.precision", what, f"set it to {own}")


def accepted_model_folder(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """The log records accepted changes of the model folder."""
    if (parent := facts.parent) and parent.may_change_files:
        yield from _changed(spec, facts, parent, "")


def parent_without_daemon(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A training command without a daemon may delete the fork's checkpoint."""
    if (parent := facts.parent) and parent.is_direct and parent.checkpoint is not None:
        what = (
            "was trained without a daemon: its training command does not protect the checkpoint of this fork"
        )
        fix = f"continue it with `sftd resume {parent.run_id}`, or that command may delete the checkpoint"
        yield Problem(parent.run_id, what, fix)


def source_with_other_files(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A source whose rows have changed begins at its first row."""
    if facts.parent is None or facts.train is None:
        return
    was = {source.name: source.digest for source in facts.parent.sources}
    for source in facts.train.sources:
        if was.get(source.name, source.digest) != source.digest:
            what = (
                f"{source.name} has other files than in {facts.parent.run_id}, and is read from its first row"
            )
            yield Problem("data.sources", what)


FORK = Rules(
    refuse=(
        changed_model_folder,
        other_model_than_checkpoint,
        other_dtype_than_checkpoint,
        other_base_than_checkpoint,
        other_adapters_than_checkpoint,
        other_frozen_weights_than_checkpoint,
        other_precision_than_checkpoint,
    ),
    warn=(accepted_model_folder, parent_without_daemon, source_with_other_files),
)
