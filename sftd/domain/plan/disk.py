"""The disk that a run takes: checkpoints as its rules keep them, and an export."""

from __future__ import annotations

import msgspec

from sftd.domain.model.parameters import whole_model
from sftd.domain.model.shape import ModelShape
from sftd.domain.plan.duration import save_steps
from sftd.domain.plan.sizes import CHECKPOINT_BYTES, SAVE_HEADROOM
from sftd.domain.spec.spec import Spec

_WIDTH = {"float32": 4, "bfloat16": 2}


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, and how many checkpoints. `kept` are there at the end; `most` at once, the one being written included, when
    each new checkpoint is the best so far or none is: whatever needs more. `needed` is the free space for that. Of `reduced`
    of the kept ones only the weights are left at the end, which take as much as an export."""

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
    """Of a run of so many steps; those up to `first_step` are a fork's parent's, and so are their checkpoints."""
    parameters = whole_model(shape)
    size = parameters * CHECKPOINT_BYTES[dtype]
    steps = save_steps(spec, planned_steps, first_step)
    most = kept = marked = stays = 0
    policy = spec.checkpoint
    # The best may be any others than those that stay anyway.
    best = policy.keep_best if spec.data.val_files else 0
    for number in range(1, len(steps) + 1):
        # Before this one's retention: all that stayed, and itself.
        most = max(most, kept + 1)
        # One leaves the last ones; counted as it does, for a run may save ten thousand times.
        if number > policy.keep_last and policy.keep_every:
            marked += steps[number - 1 - policy.keep_last] % policy.keep_every == 0
        stays = min(number, policy.keep_last) + marked
        kept = stays + min(best, number - stays)
    return Storage(
        checkpoint=size,
        saved=len(steps),
        kept=kept,
        reduced={"all": 0, "last": kept - stays, "weights": kept}[policy.after_success],
        most=most,
        export=parameters * _WIDTH[dtype],
    )
