"""The disk that a run takes: checkpoints as its rules keep them, and an export."""

from __future__ import annotations

import msgspec

from sftd.domain.model.parameters import whole_model
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.duration import save_steps
from sftd.domain.plan.sizes import CHECKPOINT_BYTES, SAVE_HEADROOM
from sftd.domain.spec.retention import kept_by_rules
from sftd.domain.spec.spec import Spec

_WIDTH = {"float32": 4, "bfloat16": 2}


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, and how many checkpoints. `kept` are there at the end; `most` at once, the one being written included, when
    each new checkpoint is the best so far or none is: whatever needs more. `needed` is the free space for that. At the end
    `reduced` of the kept ones hold only the weights, which take as much as an export."""

    checkpoint: int
    saved: int
    kept: int
    reduced: int
    most: int
    export: int

    @property
    def at_end(self) -> int:
        """Of the checkpoints that stay."""
        return (self.kept - self.reduced) * self.checkpoint + self.reduced * self.export

    @property
    def one_save(self) -> int:
        """Free space that a save asks for."""
        return int(SAVE_HEADROOM * self.checkpoint)

    @property
    def needed(self) -> int:
        """Free space so that no save fails."""
        return (self.most - 1) * self.checkpoint + self.one_save


def storage(spec: Spec, shape: ModelShape, planned_steps: int, dtype: str, first_step: int = 0) -> Storage:
    """Of a run of `planned_steps`. Steps up to `first_step`, and their checkpoints, belong to a fork's parent."""
    parameters = whole_model(shape)
    size = parameters * CHECKPOINT_BYTES[dtype]
    steps = save_steps(spec, planned_steps, first_step)

    def count(saved: list[int]) -> tuple[int, int]:
        """How many stay besides the best, and with them: those may be any others."""
        stays = sum(map(bool, kept_by_rules(spec.checkpoint, saved, [], planned_steps).values()))
        best = spec.checkpoint.keep_best if spec.data.val_files else 0
        return stays, stays + min(best, len(saved) - stays)

    stays, kept = count(steps)
    return Storage(
        checkpoint=size,
        saved=len(steps),
        kept=kept,
        reduced={"all": 0, "last": kept - stays, "weights": kept}[spec.checkpoint.after_success],
        # Before the retention that follows the last save: never fewer stay than after an earlier one.
        most=count(steps[:-1])[1] + 1,
        export=parameters * _WIDTH[dtype],
    )
