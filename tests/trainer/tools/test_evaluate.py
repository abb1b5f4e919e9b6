"""The tool that evaluates a checkpoint: questions, scores, metrics and the file of answers."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.log.events import CheckpointPublished, SampleGenerated
from sftd.domain.spec.evaluation_section import PromptsEvaluation
from sftd.trainer.errors import UserError
from sftd.trainer.tools.evaluate import questions
from sftd.trainer.tools.evaluate.scores import is_right, mean
from tests.builders.trainer.tiny_models import PROMPT

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Run, Trainer


def evaluate(trainer: Trainer, run: Run, folder: Path, **evaluation: Any) -> tuple[int, list[Any], str]:
    """Exit code, events and standard error of the tool on the last checkpoint."""
    published = run.events(CheckpointPublished)[-1]
    file = folder / "evaluation.json"
    file.write_text(json.dumps({"kind": "prompts", "name": "tested"} | evaluation))
    arguments = [str(run.attempt.order_file), published.path, "--digest", published.manifest_digest]
    arguments += ["--evaluation", str(file), "--output", str(folder / "out"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "sftd.trainer.tools.evaluate", *arguments],
        env=trainer.environment(),
        capture_output=True,
        text=True,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def written(path: Path, rows: list[Any]) -> str:
    """The rows as JSON lines. Returns the digest."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_checkpoint_is_asked_and_its_answers_are_scored(
    trainer: Trainer, base: Run, tmp_path: Path
) -> None:
    sample = base.events(SampleGenerated)[-1]
    file = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": "a longer prompt", "reference": "nonsense"},
        {"prompt": PROMPT, "reference": ["nonsense", f" {sample.text}\n"]},
        {"messages": [{"role": "user", "content": PROMPT}], "reference": sample.text},
        {"prompt": "not asked", "reference": ""},
    ]
    digest = written(file, rows)
    options = {"file": str(file), "max_tokens": 8, "limit": 3, "batch_size": 2}
    code, events, errors = evaluate(trainer, base, tmp_path, **options)
    assert (code, errors) == (0, "")
    *others, done = events
    answering = [(e["done"], e["total"]) for e in others if e["stage"] == "answering"]
    assert answering == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert done["metrics"] == pytest.approx({"exact_match": 2 / 3, "exact_match_stderr": 1 / 3})
    assert (done["step"], done["questions"], done["questions_digest"]) == (sample.step, 3, digest)
    assert done["environment"]["device"] == "cpu"
    answers = pq.read_table(done["answers"]).to_pylist()
    assert [(row["question"], row["score"]) for row in answers] == [(0, 0.0), (1, 1.0), (2, 1.0)]
    assert [row["answer"] for row in answers[1:]] == [sample.text, sample.text]
    assert (answers[1]["tokens"], answers[1]["prompt"]) == (sample.tokens, PROMPT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.parquet"]


def test_a_choice_is_the_most_likely_one(trainer: Trainer, base: Run, tmp_path: Path) -> None:
    # The greedy answer is far likelier than others of its length, and less likely than a shorter one.
    sample = base.events(SampleGenerated)[-1]
    longer, file = sample.text + "~~", tmp_path / "questions.parquet"
    rows = [
        {"prompt": PROMPT, "choices": ["~" * len(sample.text), sample.text], "answer": "1"},
        {"prompt": PROMPT, "choices": [longer, sample.text], "answer": "0"},
    ]
    for row in rows:
        row["answer"] = row["choices"][int(row["answer"])]
    pq.write_table(pa.Table.from_pylist(rows), file)
    code, events, errors = evaluate(trainer, base, tmp_path, file=str(file), metric="choice")
    assert (code, errors) == (0, "")
    metrics = events[-1]["metrics"]
    assert (metrics["accuracy"], metrics["accuracy_stderr"]) == (0.5, 0.5)
    assert set(metrics) == {f"accuracy{part}{end}" for part in ("", "_normalised") for end in ("", "_stderr")}
    answers = pq.read_table(events[-1]["answers"]).to_pylist()
    assert [(row["answer"], row["score"]) for row in answers] == [(sample.text, 1.0), (sample.text, 0.0)]


def test_lm_eval_asks_the_checkpoint_or_names_the_missing_package(
    trainer: Trainer, base: Run, tmp_path: Path
) -> None:
    sample = base.events(SampleGenerated)[-1]
    file, task = tmp_path / "questions.jsonl", tmp_path / "task.yaml"
    written(file, [{"question": "a", "choices": ["~~", sample.text], "answer": n % 2} for n in range(4)])
    task.write_text(
        "task: local\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        f"metric_list: [{{metric: acc}}]\ndataset_kwargs:\n  data_files: {{test: {file}}}\n"
    )
    code, events, errors = evaluate(trainer, base, tmp_path, kind="lm_eval", tasks=[str(task)], limit=2)
    if find_spec("lm_eval") is None:
        assert (code, events) == (2, [])
        assert "lm_eval, which is not installed; fix: pip install 'lm_eval" in errors
        return
    assert code == 0, errors
    assert (events[-1]["metrics"]["local.acc"], events[-1]["questions"]) == (0.5, 2)
    answers = pq.read_table(events[-1]["answers"]).to_pylist()
    assert sorted(row["score"] for row in answers) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("metric", "row", "why"),
    [
        ("exact_match", "[1]", "a question must be an object"),
        ("exact_match", '{"prompt": "a"', "is not JSON: Expecting"),
        ("exact_match", {"reference": "a"}, "either `prompt` or `messages`"),
        ("exact_match", {"prompt": "", "reference": "a"}, "`prompt` must be a text that is not empty"),
        ("exact_match", {"messages": ["a"], "reference": "a"}, "`messages` must be a list of messages"),
        ("exact_match", {"prompt": "a"}, "`reference` must be a text or a list of texts"),
        ("regex", {"prompt": "a", "reference": ["b", "("]}, r"the reference '\(' is not a pattern"),
        ("choice", {"prompt": "a", "choices": ["b"]}, "`choices` must be a list of at least two texts"),
        (
            "choice",
            {"prompt": "a", "choices": ["b", "c"], "answer": 2},
            "`answer` must be one of the choices",
        ),
        ("choice", {"prompt": "a", "choices": ["b", "c"], "answer": True}, "`answer` must be one of"),
    ],
)
def test_an_unusable_question_is_named_by_its_line(tmp_path: Path, metric: Any, row: Any, why: str) -> None:
    file = tmp_path / "questions.jsonl"
    good = {"prompt": "a", "reference": "b", "choices": ["b", "c"], "answer": 0}
    file.write_text(f"{json.dumps(good)}\n\n{row if isinstance(row, str) else json.dumps(row)}\n")
    evaluation = PromptsEvaluation(name="tested", file=str(file), metric=metric)
    with pytest.raises(UserError, match=rf"questions\.jsonl, line 3.*{why}.*; fix: "):
        questions.read(evaluation)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "questions.parquet"
    for content, why in (
        (None, "No such file"),
        (b"PAR1", "is not a Parquet file"),
        (b"", "is not a Parquet"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=rf"(?s){why}.*fix: "):
            questions.read(PromptsEvaluation(name="tested", file=str(file)))
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), file)
    with pytest.raises(UserError, match="has no questions"):
        questions.read(PromptsEvaluation(name="tested", file=str(file)))
    # A null is no value.
    pq.write_table(pa.table({"prompt": ["a", "b"], "messages": [None, None], "reference": ["c", None]}), file)
    with pytest.raises(UserError, match="row 2: `reference` must"):
        questions.read(PromptsEvaluation(name="tested", file=str(file)))


@pytest.mark.parametrize(
    ("metric", "answer", "references", "right"),
    [
        ("exact_match", " 4\t 2\n", ["3", "4 2"], True),
        ("exact_match", "42", ["4 2"], False),
        ("exact_match", "Yes", ["yes"], False),
        ("regex", "it is 42.", [r"\b42\b"], True),
        ("regex", "it is 421.", [r"\b42\b"], False),
        ("json", ' {"a": [1]} ', [], True),
        ("json", '{"a": NaN}', [], False),
        ("json", 'a {"a": 1}', [], False),
    ],
)
def test_scores(metric: str, answer: str, references: list[str], *, right: bool) -> None:
    assert is_right(metric, answer, references) == right


def test_a_mean_has_a_standard_error() -> None:
    assert mean("m", [1.0]) == {"m": 1.0}
    assert mean("m", [1, 0, 0, 0]) == pytest.approx({"m": 0.25, "m_stderr": math.sqrt(0.1875 / 3)})
