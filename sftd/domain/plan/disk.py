"""Disk use of a run: checkpoints under its retention rules, and an export."""

from __future__ import annotations

import msgspec

from sftd.domain.model.parameters import trained_parameters, whole_model
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.duration import save_steps
from sftd.domain.plan.sizes import SAVE_HEADROOM, WEIGHT_BYTES, checkpoint_bytes
from sftd.domain.spec.retention import best_rule, kept_by_rules
from sftd.domain.spec.spec import Spec


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes and numbers of checkpoints. `saved` are written in total and `kept` remain at the end. `most` exist at
    the same time in the worst case, including the one being written. `reduced` of the kept ones hold only the weights at the
    end, which take `weights` bytes. `checkpoint` and `export` are the bytes of one."""

    checkpoint: int
    weights: int
    saved: int
    kept: int
    reduced: int
    most: int
    export: int

    @property
    def at_end(self) -> int:
        """Bytes of the checkpoints that remain at the end."""
        return (self.kept - self.reduced) * self.checkpoint + self.reduced * self.weights

    @property
    def one_save(self) -> int:
        """Free bytes that a save requires."""
        return int(SAVE_HEADROOM * self.checkpoint)

    @property
    def needed(self) -> int:
        """Free bytes that the whole run requires, so that no save fails."""
        return (self.most - 1) * self.checkpoint + self.one_save


def storage(spec: Spec, shape: ModelShape, planned_steps: int, dtype: str, first_step: int = 0) -> Storage:
    """Disk use of a run of `planned_steps`. Steps up to `first_step` and their checkpoints belong to a fork's parent."""
    trained = trained_parameters(spec.model, shape)
    weights = WEIGHT_BYTES[dtype] * trained
    steps = save_steps(spec, planned_steps, first_step)

    def count(saved: list[int]) -> tuple[int, int]:
        """(number kept by rules other than `keep_best`, number kept in total if the best are other checkpoints)."""
        stays = sum(map(bool, kept_by_rules(spec.checkpoint, saved, [], planned_steps).values()))
        rule = best_rule(spec.checkpoint)
        is_measured = rule is not None and (rule.metric != "val_loss" or spec.data.all_val_files)
        best = rule.count if rule is not None and is_measured else 0
        return stays, stays + min(best, len(saved) - stays)

    stays, kept = count(steps)
    return Storage(
        checkpoint=trained * checkpoint_bytes(spec, dtype),
        weights=weights,
        saved=len(steps),
        kept=kept,
        reduced={"all": 0, "last": kept - stays, "weights": kept}[spec.checkpoint.after_success],
        # The peak is at the last save, before retention runs: the number kept never decreases with more saves.
        most=count(steps[:-1])[1] + 1,
        # Of a run with adapters: their PEFT folder.
        export=weights if spec.model.lora.rank else WEIGHT_BYTES[dtype] * whole_model(shape),
    )
