"""Rules of a fork: its spec must fit the model and the checkpoint of its parent."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from sftd.domain.errors import Problem
from sftd.domain.model.rules import changed_files
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec
from sftd.domain.submit.facts import Parent, SubmitFacts

# Fields of a model's shape that do not affect its parameters.
_FREE_SHAPE = frozenset(
    {"max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "unsupported"}
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
        now = msgspec.to_builtins(facts.shape)
        for key, was in parent.model.items():
            if key in now and key not in _FREE_SHAPE and now[key] != was:
                what = f"has {key} {now[key]!r}, but the checkpoint is of a model with {was!r}"
                fix = "a fork must use its parent's model; submit a new run for another model"
                yield Problem("model.partial_pretrain", what, fix)


def other_dtype_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A fork must use the dtype in which its checkpoint was trained."""
    wanted = spec.model.megatron.params_dtype
    if (parent := facts.parent) and parent.dtype and wanted not in ("auto", parent.dtype):
        what = f"is {wanted}, but the checkpoint of step {parent.checkpoint} was trained in {parent.dtype}"
        fix = f"leave it at auto, or set it to {parent.dtype}"
        yield Problem("model.megatron.params_dtype", what, fix)


def other_precision_than_checkpoint(spec: Spec, facts: SubmitFacts) -> Iterator[Problem]:
    """A lean optimizer's checkpoint has no FP32 weights, and BF16 moments."""
    wanted, parent = spec.optimizer.precision, facts.parent
    if parent and parent.checkpoint is not None and wanted != parent.precision:
        what = (
            f"is {wanted}, but the checkpoint of step {parent.checkpoint} was trained with {parent.precision}"
        )
        yield Problem("optimizer.precision", what, f"set it to {parent.precision}")


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


FORK = Rules(
    refuse=(
        changed_model_folder,
        other_model_than_checkpoint,
        other_dtype_than_checkpoint,
        other_precision_than_checkpoint,
    ),
    warn=(accepted_model_folder, parent_without_daemon),
)
