"""Rules of `evaluation`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sftd.domain.errors import Problem, quote
from sftd.domain.rules import Rules
from sftd.domain.spec.evaluation_section import named
from sftd.domain.spec.sections import EarlyStop, KeepBest
from sftd.domain.spec.spec import Spec

_VAL_FILES = "give data.val_files, or use a metric of an evaluation"


def evaluations_of_one_name(spec: Spec) -> Iterator[Problem]:
    """A name identifies an evaluation of the run."""
    for name, count in Counter(evaluation.name for evaluation in spec.evaluation).items():
        if count > 1:
            what = f"{count} evaluations have the name {name}"
            yield Problem("evaluation", what, "give each its own name")


def evaluation_between_checkpoints(spec: Spec) -> Iterator[Problem]:
    """Only a checkpoint can be evaluated."""
    interval = spec.trainer.save_interval
    for evaluation in spec.evaluation:
        every, where = evaluation.every_steps, f"evaluation.{evaluation.name}.every_steps"
        if every is None:
            continue
        if not interval:
            what = f"is {every}, but trainer.save_interval is 0: only the last step has a checkpoint"
            yield Problem(where, what, "leave it out, or set trainer.save_interval")
        elif every % interval:
            what = f"{every} is not a multiple of trainer.save_interval {interval}: those steps have no checkpoint"
            yield Problem(where, what, f"use {-(-every // interval) * interval}, or another save_interval")


def devices_of_one_process(spec: Spec) -> Iterator[Problem]:
    """sftd evaluates in one process; a command may start as many as it likes."""
    for evaluation in spec.evaluation:
        if evaluation.devices > 1 and evaluation.kind != "command":
            what = f"{evaluation.devices}, but an evaluation of kind {evaluation.kind} runs on one device"
            yield Problem(f"evaluation.{evaluation.name}.devices", what, "leave it out")


def unknown_metric(spec: Spec) -> Iterator[Problem]:
    """Early stopping and the best checkpoints need a metric that the run measures more than once."""
    stop, best = spec.trainer.early_stop, spec.checkpoint.keep_best
    rules = [("trainer.early_stop", stop), ("checkpoint.keep_best", best)]
    for where, rule in rules:
        if not isinstance(rule, EarlyStop | KeepBest):
            continue
        name, _, metric = rule.metric.partition("/")
        evaluation = named(spec.evaluation, name)
        if rule.metric == "val_loss":
            if not spec.data.all_val_files:
                yield Problem(where, "val_loss is not measured: there are no validation files", _VAL_FILES)
            elif rule is stop and not spec.trainer.val_check_interval:
                what = "val_loss is measured only at the start and the end"
                yield Problem(where, what, "set trainer.val_check_interval")
        elif evaluation is None or not metric:
            names = [f"{x.name}/METRIC" for x in spec.evaluation]
            yield Problem(
                where, f"unknown metric {quote(rule.metric)}", f"use {', '.join(['val_loss', *names])}"
            )


EVALUATION = Rules(
    refuse=(
        evaluations_of_one_name,
        evaluation_between_checkpoints,
        devices_of_one_process,
        unknown_metric,
    ),
)
