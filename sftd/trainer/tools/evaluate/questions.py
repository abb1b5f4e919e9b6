"""Reads the questions of an evaluation of kind `prompts`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftd.domain.spec.evaluation_section import PromptsEvaluation
from sftd.trainer.errors import UserError

_FIX = "fix: correct the row or remove it"


@dataclass(frozen=True)
class Question:
    """`where`: file and line, for errors. `prompt`: a user's message, or messages. `references`: texts, or patterns, one of which
    must match; of a multiple choice the right choice. `choices` is empty for other metrics."""

    where: str
    prompt: str | list[dict[str, Any]]
    references: list[str]
    choices: list[str]

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, ensure_ascii=False)

    def unusable(self, why: object) -> UserError:
        """The error that names the question's place."""
        return UserError(f"{self.where}: {why}; {_FIX}")


@dataclass(frozen=True)
class Asked:
    """`digest`: sha256 of the file."""

    questions: list[Question]
    digest: str


def read(evaluation: PromptsEvaluation) -> Asked:
    """The questions of the file. Raises `UserError` with the line of one that its metric cannot use."""
    path = Path(evaluation.file)
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path)
        # A number of None takes all.
        found = [_question(where, row, evaluation.metric) for where, row in islice(rows, evaluation.limit)]
    except OSError as error:
        raise UserError(f"evaluation {evaluation.name}: {error}; fix: correct `file`") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file: {error}; fix: write it again") from error
    if not found:
        raise UserError(f"{path} has no questions; fix: give a file with at least one")
    return Asked(found, digest)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON: {error}; {_FIX}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                # Parquet has a null where a row has no value.
                yield f"{path}, row {number}", {key: value for key, value in row.items() if value is not None}


def _question(where: str, row: Any, metric: str) -> Question:
    def refuse(why: str) -> UserError:
        return UserError(f"{where}: {why}; {_FIX}")

    if not isinstance(row, dict):
        raise refuse("a question must be an object")
    if ("prompt" in row) == ("messages" in row):
        raise refuse("a question has either `prompt` or `messages`")
    prompt: Any = row.get("prompt", row.get("messages"))
    if "prompt" in row and not (isinstance(prompt, str) and prompt):
        raise refuse("`prompt` must be a text that is not empty")
    if "messages" in row and not (prompt and _are(prompt, dict)):
        raise refuse("`messages` must be a list of messages that is not empty")
    references: Any = []
    choices: Any = []
    if metric == "choice":
        choices = row.get("choices")
        if not (_are(choices, str) and len(choices) > 1 and all(choices)):
            raise refuse("`choices` must be a list of at least two texts")
        references = [_right(row.get("answer"), choices, refuse)]
    elif metric != "json":
        references = row.get("reference")
        references = [references] if isinstance(references, str) else references
        if not (references and _are(references, str)):
            raise refuse("`reference` must be a text or a list of texts")
    if metric == "regex":
        for pattern in references:
            try:
                re.compile(pattern)
            except re.error as error:
                raise refuse(f"the reference {pattern!r} is not a pattern ({error})") from error
    return Question(where, prompt, references, choices)


def _right(answer: Any, choices: list[str], refuse: Any) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    if isinstance(answer, str) and answer in choices:
        return answer
    raise refuse("`answer` must be one of the choices, or its number from 0")


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
