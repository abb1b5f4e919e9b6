"""Logits against transformers, the loss against PyTorch, packed samples against each other: one torchrun per TP size."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.trainer.conftest import Trainer  # type: ignore[import-not-found]

SCRIPT = Path(__file__).with_name("parity_ranks.py")
MODELS = ("llama_tied", "llama", "llama3_rope", "mistral", "qwen2", "qwen3")
TOKENS = list(range(3, 51))


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, Any]:
    """Logits of transformers for TOKENS: FP32 [48, vocabulary] as nested lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        found = {}
        for name in MODELS:
            model = transformers.AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
            with torch.no_grad():
                found[name] = model(input_ids=torch.tensor([TOKENS])).logits[0]
        return found


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def ranks(request: pytest.FixtureRequest, trainer: Trainer, models: Path, expected: dict[str, Any]) -> Any:
    """What `parity_ranks.py` found."""
    import torch

    size = request.param
    spec = trainer.spec(size, training__use_rmpad=True, model__megatron__tensor_model_parallel_size=size)
    attempt = trainer.prepare(f"parity{size}", spec)
    torch.save({"tokens": TOKENS, "models": str(models), "expected": expected}, attempt.path / "expected.pt")
    trainer.finish(attempt, trainer.start(attempt, script=SCRIPT))
    return json.loads((attempt.path / "found.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(ranks: dict[str, Any], name: str) -> None:
    assert ranks["logits"][name] < 1e-4


def test_loss_and_its_gradient_are_those_of_pytorch(ranks: dict[str, Any]) -> None:
    assert ranks["loss"] < 1e-5
    # The gradients are scaled by up to 9 here.
    assert ranks["gradient"] < 1e-5


def test_padding_of_the_vocabulary_is_never_chosen_and_gets_no_gradient(ranks: dict[str, Any]) -> None:
    assert ranks["padding_gradient"] == 0.0
    assert ranks["padded_loss"] < 1e-5


def test_a_packed_sample_does_not_see_its_neighbours(ranks: dict[str, Any]) -> None:
    assert ranks["neighbours_unchanged"]
    assert ranks["perturbed_changed"]
    assert ranks["packed_against_alone"] < 1e-4
