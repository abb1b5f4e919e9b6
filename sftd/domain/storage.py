"""The disk that a run takes: checkpoints as its rules keep them, and an export."""

from __future__ import annotations

import msgspec

from sftd.domain.layout import ModelShape
from sftd.domain.pace import save_steps
from sftd.domain.parameters import whole_model
from sftd.domain.spec import Spec

# Bytes of a checkpoint per parameter: two FP32 moments and the weight in FP32, and in BF16 besides
# (`trainer/trainee.py`).
_STATE_BYTES = {"float32": 12, "bfloat16": 14}
_WIDTH = {"float32": 4, "bfloat16": 2}
# Free space that a save asks for, as a share of its size (`trainer/checkpoint.py`).
_HEADROOM = 1.1


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, and how many checkpoints. `kept` are there at the end; `most` at once, the one being written included, when
    each new checkpoint is the best so far or none is: whatever needs more. `needed` is the free space for that."""

    checkpoint: int
    saved: int
    kept: int
    most: int
    export: int

    @property
    def at_end(self) -> int:
        """Of the checkpoints that stay."""
        return self.kept * self.checkpoint

    @property
    def needed(self) -> int:
        """Free space so that no save fails."""
        return int((self.most - 1 + _HEADROOM) * self.checkpoint)


def storage(spec: Spec, shape: ModelShape, planned_steps: int, dtype: str) -> Storage:
    """Of a run of so many steps."""
    parameters = whole_model(shape)
    size = parameters * _STATE_BYTES[dtype]
    steps = save_steps(spec, planned_steps)
    most = kept = 0
    policy = spec.checkpoint
    for number, _ in enumerate(steps, start=1):
        # Before this one's retention: all that stayed, and itself.
        most = max(most, kept + 1)
        done = steps[:number]
        stays = set(done[-policy.keep_last :]) | {
            s for s in done if policy.keep_every and s % policy.keep_every == 0
        }
        # The best may be any others than those.
        others = len(done) - len(stays)
        best = policy.keep_best if spec.data.val_files else 0
        kept = len(stays) + min(best, others)
    return Storage(checkpoint=size, saved=len(steps), kept=kept, most=most, export=parameters * _WIDTH[dtype])
