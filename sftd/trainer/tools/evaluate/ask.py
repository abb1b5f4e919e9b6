"""An evaluation of kind `prompts`: asks the questions and scores the answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from sftd.domain.spec.evaluation_section import PromptsEvaluation
from sftd.trainer.decoding.decoder import Decoder
from sftd.trainer.decoding.prompts import Prompts
from sftd.trainer.errors import UserError
from sftd.trainer.tools.evaluate.questions import Asked, Question
from sftd.trainer.tools.evaluate.result import Result
from sftd.trainer.tools.evaluate.scores import is_right, mean

Progress = Callable[[int, int], None]


def ask(
    evaluation: PromptsEvaluation, asked: Asked, decoder: Decoder, renderer: Prompts, progress: Progress
) -> Result:
    """Metrics and answers. Raises `UserError` with the line of a question that cannot be rendered.

    exact_match: equal to a reference, if runs of whitespace count as one blank and none at the ends. regex: a reference, as a
    pattern, is found in the answer. json: the answer is one JSON value. choice: `accuracy`, the choice with the largest
    log-likelihood after the prompt is the right one; `accuracy_normalised`, the same with the log-likelihood per token.
    """
    prompts = [_of(question, renderer.ids, question.prompt) for question in asked.questions]
    progress(0, len(prompts))
    if evaluation.metric == "choice":
        return _choose(asked, prompts, decoder, renderer, progress)
    rows: list[dict[str, Any]] = []
    for answer in decoder.answers(
        prompts,
        limit=evaluation.max_tokens,
        stops=renderer.ends,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
    ):
        question, text = asked.questions[answer.number], renderer.text(answer.tokens)
        rows.append(
            {
                "question": answer.number,
                "prompt": question.text,
                "answer": text,
                "reference": question.references,
                "score": float(is_right(evaluation.metric, text, question.references)),
                "tokens": len(answer.tokens),
                "seconds": answer.seconds,
            }
        )
        progress(len(rows), len(prompts))
    rows.sort(key=lambda row: row["question"])
    return Result(mean(evaluation.metric, [row["score"] for row in rows]), rows, asked.digest)


def _choose(
    asked: Asked, prompts: list[list[int]], decoder: Decoder, renderer: Prompts, progress: Progress
) -> Result:
    texts = [
        (prompt + _of(question, renderer.continuation, choice), len(prompt))
        for question, prompt in zip(asked.questions, prompts, strict=True)
        for choice in question.choices
    ]
    found = []
    for done, likelihood in enumerate(decoder.likelihoods(texts), start=1):
        found.append(likelihood)
        progress(done * len(prompts) // len(texts), len(prompts))
    found.sort(key=lambda likelihood: likelihood.number)
    rows: list[dict[str, Any]] = []
    normalised, in_order = [], iter(found)
    for number, question in enumerate(asked.questions):
        its = list(islice(in_order, len(question.choices)))
        best = max(range(len(its)), key=lambda n: its[n].total)
        best_by_token = max(range(len(its)), key=lambda n: its[n].total / its[n].tokens)
        normalised.append(float(question.choices[best_by_token] in question.references))
        rows.append(
            {
                "question": number,
                "prompt": question.text,
                "answer": question.choices[best],
                "reference": question.references,
                "score": float(question.choices[best] in question.references),
                "tokens": its[best].tokens,
                "seconds": its[best].seconds,
            }
        )
    metrics = mean("accuracy", [row["score"] for row in rows]) | mean("accuracy_normalised", normalised)
    return Result(metrics, rows, asked.digest)


def _of[T](question: Question, function: Callable[[T], list[int]], argument: T) -> list[int]:
    try:
        return function(argument)
    except UserError as error:
        raise question.unusable(error) from error
