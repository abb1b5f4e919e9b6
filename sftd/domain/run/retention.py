"""Retention: which checkpoints stay, from the state of the run."""

from __future__ import annotations

import msgspec

from sftd.domain.run.early_stop import values_of
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.retention import best_rule, kept_by_rules


def why_kept(run: Run) -> dict[int, list[str]]:
    """Step → reasons why its checkpoint stays. A checkpoint without a reason may be deleted."""
    timeline = sorted(c.step for c in run.checkpoints if not c.superseded)
    reasons: dict[int, list[str]] = {c.step: [] for c in run.checkpoints}
    reasons |= kept_by_rules(run.spec.checkpoint, timeline, _best(run), run.planned_steps)
    if verified := [c for c in run.checkpoints if c.verified]:
        reasons[max(verified, key=lambda c: c.version).step].append("last verified")
    for c in run.checkpoints:
        if c.is_parents:
            reasons[c.step].append("the parent's: not this run's to delete")
        reasons[c.step] += [f"fork {name} starts from it" for name in c.forks]
    for x in run.evaluations:
        if x.is_open and x.step in reasons:
            reasons[x.step].append(f"evaluation {x.name} is {x.status}")
    if run.status != "succeeded":
        # Until the new timeline reaches their steps, these are the only checkpoints of the steps. Also, an attempt may be
        # about to overwrite such a folder.
        for c in run.checkpoints:
            if c.superseded:
                reasons[c.step].append("superseded, until the run succeeds")
    if run.resume_from is not None and run.resume_from in reasons:
        reasons[run.resume_from].append("about to be resumed from")
    return reasons


def reducible(run: Run) -> list[CheckpointInfo]:
    """Checkpoints of a succeeded run that `checkpoint.after_success` reduces to their weights: with `last` those that only
    `keep_best` keeps, with `weights` all. Excludes fork points and the parent's checkpoint."""
    policy = run.spec.checkpoint
    if run.status != "succeeded" or policy.after_success == "all":
        return []
    kept = why_kept(run)
    no_best = msgspec.structs.replace(policy, keep_best=0)
    spec = msgspec.structs.replace(run.spec, checkpoint=no_best)
    kept_besides = why_kept(msgspec.structs.replace(run, spec=spec))
    return [
        c
        for c in run.checkpoints
        if not (c.weights_only or c.is_parents or c.forks)
        and kept[c.step]
        and (policy.after_success == "weights" or not kept_besides[c.step])
    ]


def _best(run: Run) -> list[int]:
    """Steps of the timeline's checkpoints, the best by `checkpoint.keep_best` first; of equal ones, the earlier."""
    rule = best_rule(run.spec.checkpoint)
    if rule is None:
        return []
    sign = -1.0 if rule.mode == "max" else 1.0
    have = {c.step for c in run.checkpoints if not c.superseded}
    scored = [(sign * value, step) for step, value in values_of(run, rule.metric) if step in have]
    return [step for _, step in sorted(scored)]


def deletable(run: Run) -> list[CheckpointInfo]:
    """Checkpoints that no rule keeps. Empty while an attempt starts, because it may still read its checkpoint."""
    if run.status == "starting":
        return []
    reasons = why_kept(run)
    return [c for c in run.checkpoints if not reasons[c.step]]
