"""The checkpoints that the rules of `checkpoint` keep. Retention and the disk plan of a run share this rule."""

from __future__ import annotations

from collections.abc import Sequence

from sftd.domain.spec.sections import Checkpoint, KeepBest


def best_rule(policy: Checkpoint) -> KeepBest | None:
    """The rule of `keep_best`; None keeps none."""
    if isinstance(policy.keep_best, KeepBest):
        return policy.keep_best
    return KeepBest(metric="val_loss", mode="min", count=policy.keep_best) if policy.keep_best else None


def kept_by_rules(
    policy: Checkpoint, steps: Sequence[int], best: Sequence[int], planned_steps: int
) -> dict[int, list[str]]:
    """Step → rules that keep its checkpoint. `steps` are the steps with checkpoints, ascending; `best` are those of them with a
    value of the metric of `keep_best`, best first."""
    reasons: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-policy.keep_last :]:
        reasons[step].append("last" if step == steps[-1] else f"last {policy.keep_last}")
    rule = best_rule(policy)
    count = rule.count if rule else 0
    for rank, step in enumerate(best[:count]):
        reasons[step].append("best" if rank == 0 else f"best {count}")
    for step in steps:
        if policy.keep_every and step % policy.keep_every == 0:
            reasons[step].append(f"every {policy.keep_every}")
        if step == planned_steps:
            reasons[step].append("final")
    return reasons
