"""An evaluation of kind `lm_eval`: EleutherAI's lm-evaluation-harness asks the checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from sftd.domain.spec.evaluation_section import HarnessEvaluation
from sftd.trainer.errors import UserError
from sftd.trainer.tools.evaluate.result import Result

# If a task does not limit its answers. As in the harness for transformers' models.
_NEW_TOKENS = 256


def check_installed() -> None:
    """Raise `UserError` without the harness."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "an evaluation of kind lm_eval needs the package lm_eval, which is not installed; fix: pip install 'lm_eval>=0.4.13'"
        )


def run(
    evaluation: HarnessEvaluation,
    decoder: Any,
    renderer: Any,
    max_length: int,
    progress: Callable[[int, int], None],
) -> Result:
    """Metrics named TASK.METRIC, with .FILTER if the task has several, and the answers with each task's first metric as their
    score. `decoder`: a `Decoder`; `renderer`: `Prompts`; `max_length`: tokens of the longest text that the model reads.

    Prompts are bare text, as the harness makes them without a chat template. Raises `UserError` for a task that cannot be run.
    """
    from lm_eval import evaluator

    model = _model(decoder, renderer, max_length, progress)
    try:
        found = evaluator.simple_evaluate(
            model=model,
            tasks=list(evaluation.tasks),
            num_fewshot=evaluation.num_fewshot,
            limit=evaluation.limit,
            # Of standard errors that have no formula. The harness's default takes minutes.
            bootstrap_iters=1000,
        )
    except UserError:
        raise
    except Exception as error:  # a task is a program and can raise anything
        raise UserError(
            f"lm_eval cannot run {', '.join(evaluation.tasks)}: {error}; fix: name tasks of `lm_eval ls tasks`, or YAML files"
        ) from error
    metrics = {
        f"{task}.{key.removesuffix(',none').replace(',', '.')}": float(value)
        for task, values in found["results"].items()
        for key, value in values.items()
        # A word perplexity may overflow; a value that cannot be computed is a text.
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    samples = [(task, sample) for task, samples in found["samples"].items() for sample in samples]
    hashes = "".join(sample[key] for _, sample in samples for key in ("prompt_hash", "target_hash"))
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    return Result(metrics, [_row(n, task, sample) for n, (task, sample) in enumerate(samples)], digest)


def _row(number: int, task: str, sample: dict[str, Any]) -> dict[str, Any]:
    first, response = sample["arguments"], sample["filtered_resps"]
    prompt = first["gen_args_0"]["arg_0"] if isinstance(first, dict) else first[0][0]
    score = sample.get(sample["metrics"][0])
    return {
        "question": number,
        "prompt": f"{task}: {prompt}",
        "answer": response[0] if len(response) == 1 and isinstance(response[0], str) else repr(response),
        "reference": [str(sample["target"])],
        "score": float(score) if isinstance(score, int | float) else None,
    }


def _model(decoder: Any, renderer: Any, max_length: int, progress: Callable[[int, int], None]) -> Any:
    from lm_eval.api.model import TemplateLM

    # Here, because the package may be missing.
    class CheckpointModel(TemplateLM):
        """The harness's seam to a model."""

        tokenizer = renderer.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(renderer.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            bos = renderer.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else int(bos)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return list(renderer.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"])

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            texts = []
            for _, context, continuation in requests:
                # From the left, as the harness does: the last token is not read.
                ids = (context + continuation)[-(max_length + 1) :]
                texts.append((ids, max(1, len(ids) - len(continuation))))
            found: list[Any] = [None] * len(texts)
            for done, likelihood in enumerate(decoder.likelihoods(texts), start=1):
                found[likelihood.number] = (likelihood.total, likelihood.is_greedy)
                progress(done, len(texts))
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            windows, owners = [], []
            for number, request in enumerate(requests):
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=max_length,
                    context_len=1,
                ):
                    windows.append((None, *make_disjoint_window(window)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[owner] += total
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found: list[str] = [""] * len(requests)
            done = 0
            for options, numbers in _by_options(requests):
                limit = int(options.get("max_gen_toks", _NEW_TOKENS))
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                prompts = [
                    (self.tok_encode(requests[n].args[0]) or [self.prefix_token_id])[-(max_length - limit) :]
                    for n in numbers
                ]
                temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0

                def ends(tokens: list[int], until: list[str] = until) -> bool:
                    # Each text that stops an answer has at most as many tokens as bytes.
                    tail = renderer.tokenizer.decode(tokens[-max(map(len, until), default=1) - 8 :])
                    return renderer.ends(tokens) or any(text in tail for text in until)

                answers = decoder.answers(prompts, limit=limit, stops=ends, temperature=temperature)
                for answer in answers:
                    text = renderer.text(answer.tokens)
                    for stop in until:
                        text = text.split(stop)[0]
                    found[numbers[answer.number]] = text
                    done += 1
                    progress(done, len(requests))
            return found

    return CheckpointModel()


def _by_options(requests: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The generation options of the requests, and the numbers of those with the same."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for number, request in enumerate(requests):
        options = request.args[1]
        groups.setdefault(repr(sorted(options.items())), (options, []))[1].append(number)
    yield from groups.values()
