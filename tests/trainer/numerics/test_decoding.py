"""Sampled answers do not depend on the batch or the layout; likelihoods are those of transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.builders.paths import RANKS

if TYPE_CHECKING:
    from tests.builders.warm_ranks import WarmTrainer

# Gemma 2 has soft-capped logits. The vocabulary of llama2 is padded on two ranks.
MODELS = ("gemma2", "llama2")
# Step of the token ids, and length. Answers end at different places, and waiting prompts take their rows.
SIZES = ((3, 5), (7, 40), (11, 17), (13, 1), (17, 9), (19, 30), (23, 2), (29, 22))
PROMPTS = [[5 + n * place % 240 for place in range(length)] for n, length in SIZES]
TEXTS = [[[*prompt, 9, 17, 9, 30], max(1, len(prompt))] for prompt in PROMPTS]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_a_function_of_seed_and_prompt_and_likelihoods_are_those_of_transformers(
    warm: WarmTrainer, models: Path, tmp_path: Path, name: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        network = transformers.AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
    expected = []
    with torch.no_grad():
        for ids, start in TEXTS:
            scores = network(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            labels = torch.tensor(ids[start:])
            total = scores.gather(1, labels[:, None]).sum().item()
            expected.append((total, len(labels), bool((scores.argmax(-1) == labels).all())))
        # One text that is the most probable.
        best = network.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    texts = [*TEXTS, [best[0].tolist(), len(PROMPTS[0])]]
    found: list[Any] = []
    for ranks in (1, 2):
        spec = {
            "model": {
                "partial_pretrain": str(models / name),
                "megatron": {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1},
            },
            "launch": {"device": "cpu", "nproc_per_node": ranks},
        }
        asked, log = tmp_path / "asked.json", tmp_path / "log"
        asked.write_text(json.dumps({"spec": spec, "prompts": PROMPTS, "texts": texts}))
        arguments = [str(asked), str(tmp_path / f"found-{ranks}")]
        codes = warm.script(RANKS / "decoding_ranks.py", arguments, ranks, log).wait()
        assert codes == [0] * ranks, log.read_text()
        found += [json.loads((tmp_path / f"found-{ranks}.{rank}").read_text()) for rank in range(ranks)]
    for of_rank in found:
        first, *others = of_rank["sampled"]
        assert others == [first, first]
        assert first == found[0]["sampled"][0] != of_rank["of another seed"]
        *given, greedy = of_rank["likelihoods"]
        for (total, count, is_greedy), truth in zip(given, expected, strict=True):
            assert (total, count, is_greedy) == (pytest.approx(truth[0], rel=1e-5), *truth[1:])
        assert greedy[2]
