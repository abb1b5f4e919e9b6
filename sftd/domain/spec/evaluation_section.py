"""`evaluation`: a list of evaluations of a run's checkpoints, by kind."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sftd.domain.spec.sections import Count, NonNegative, Section, Size

# The name is a part of metric names and of file names.
EvaluationName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Text = Annotated[str, Meta(min_length=1)]


class Evaluation(Section, frozen=True, tag_field="kind"):
    """What all kinds of evaluations have."""

    name: Annotated[
        EvaluationName,
        Meta(description="name, unique in the run; its metrics are named NAME/METRIC"),
    ]
    every_steps: Annotated[
        Size | None,
        Meta(
            description="evaluate the checkpoints of multiples of this, a multiple of trainer.save_interval, and the last"
        ),
    ] = None
    at_checkpoints: Annotated[
        bool,
        Meta(
            description="without every_steps: evaluate each checkpoint; false evaluates only what `sftd eval` requests"
        ),
    ] = True
    timeout_seconds: Annotated[
        Size, Meta(description="seconds after which the evaluation is killed and has failed")
    ] = 3600
    devices: Annotated[
        Size, Meta(description="devices of the evaluation; kinds other than command use one")
    ] = 1

    @property
    def kind(self) -> str:
        """The kind of the evaluation, as in the spec."""
        return str(self.__struct_config__.tag)

    def is_due(self, step: int, planned_steps: int) -> bool:
        """Whether the checkpoint of `step` is evaluated without a request."""
        if self.every_steps is None:
            return self.at_checkpoints
        return step % self.every_steps == 0 or step == planned_steps


class PromptsEvaluation(Evaluation, frozen=True, kw_only=True, tag="prompts"):
    """Questions with references, answered by the checkpoint."""

    file: Annotated[
        Text, Meta(description="JSONL or Parquet file of questions with prompt, or messages, and reference")
    ]
    metric: Annotated[
        Literal["exact_match", "regex", "json", "choice"],
        Meta(
            description="score of an answer: equal to the reference, matched by it as a pattern, valid JSON, or the most likely choice"
        ),
    ] = "exact_match"
    max_tokens: Annotated[Size, Meta(description="maximum tokens of an answer")] = 256
    temperature: Annotated[NonNegative, Meta(description="temperature of sampling; 0 is greedy")] = 0.0
    seed: Annotated[Count, Meta(description="seed of sampling")] = 0
    batch_size: Annotated[Size, Meta(description="questions that are answered at once")] = 16
    limit: Annotated[Size | None, Meta(description="number of questions to use; all when not set")] = None


class HarnessEvaluation(Evaluation, frozen=True, kw_only=True, tag="lm_eval"):
    """Tasks of EleutherAI's lm-evaluation-harness."""

    tasks: Annotated[list[Text], Meta(min_length=1, description="names of tasks, or YAML files of tasks")]
    num_fewshot: Annotated[
        Count | None, Meta(description="examples before each question; each task's own number when not set")
    ] = None
    batch_size: Annotated[Size, Meta(description="questions that are answered at once")] = 16
    limit: Annotated[Size | None, Meta(description="number of questions of each task; all when not set")] = (
        None
    )


class CommandEvaluation(Evaluation, frozen=True, kw_only=True, tag="command"):
    """A program that evaluates the exported model."""

    argv: Annotated[
        list[str],
        Meta(
            min_length=1,
            description="program and arguments; the folder of the exported model is appended. The program writes one JSON object of "
            "numbers to stdout",
        ),
    ]


EVALUATIONS = PromptsEvaluation | HarnessEvaluation | CommandEvaluation


def named(evaluations: list[EVALUATIONS], name: str) -> EVALUATIONS | None:
    """The evaluation with this name."""
    return next((evaluation for evaluation in evaluations if evaluation.name == name), None)
