"""The checkpoints that the rules of `checkpoint` keep. Retention and the disk plan of a run share this rule."""

from __future__ import annotations

from collections.abc import Sequence

from sftd.domain.spec.sections import Checkpoint


def kept_by_rules(
    policy: Checkpoint, steps: Sequence[int], best: Sequence[int], planned_steps: int
) -> dict[int, list[str]]:
    """Step → rules that keep its checkpoint. `steps` are the steps with checkpoints, ascending; `best` are those of them with a
    validation loss, lowest loss first."""
    reasons: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-policy.keep_last :]:
        reasons[step].append("last" if step == steps[-1] else f"last {policy.keep_last}")
    for rank, step in enumerate(best[: policy.keep_best]):
        reasons[step].append("best" if rank == 0 else f"best {policy.keep_best}")
    for step in steps:
        if policy.keep_every and step % policy.keep_every == 0:
            reasons[step].append(f"every {policy.keep_every}")
        if step == planned_steps:
            reasons[step].append("final")
    return reasons
