"""Logits against transformers, the loss against PyTorch, packed samples against each other: one torchrun per TP size."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.builders.paths import RANKS
from tests.builders.trainer.tiny_models import MODELS, real_model

if TYPE_CHECKING:
    from tests.builders.trainer.trainers import Trainer

SCRIPT = RANKS / "parity_ranks.py"
# Tensor parallelism alone cannot split experts with biases.
UNSPLIT = ("gpt_oss",)
TOKENS = list(range(3, 51))


def logits_of_transformers(folders: dict[str, Path]) -> dict[str, Any]:
    """Of each model for TOKENS: FP32 [48, vocabulary]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        found = {}
        for name, folder in folders.items():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                found[name] = model(input_ids=torch.tensor([TOKENS])).logits[0]
        return found


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, Any]:
    """Logits of the tiny models."""
    return logits_of_transformers({name: models / name for name in MODELS})


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def ranks(request: pytest.FixtureRequest, trainer: Trainer, models: Path, expected: dict[str, Any]) -> Any:
    """What `parity_ranks.py` found."""
    import torch

    size = request.param
    spec = trainer.spec(size, training__use_rmpad=True, model__megatron__tensor_model_parallel_size=size)
    attempt = trainer.prepare(f"parity{size}", spec)
    given = {name: value for name, value in expected.items() if size == 1 or name not in UNSPLIT}
    torch.save({"tokens": TOKENS, "models": str(models), "expected": given}, attempt.path / "expected.pt")
    trainer.finish(attempt, trainer.start(attempt, script=SCRIPT))
    return json.loads((attempt.path / "found.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(ranks: dict[str, Any], name: str) -> None:
    if len(ranks["logits"]) == len(MODELS) or name not in UNSPLIT:
        assert ranks["logits"][name] < 1e-4


@pytest.mark.real_model
def test_logits_of_a_real_model_are_those_of_transformers(trainer: Trainer) -> None:
    import torch

    folder = real_model()
    attempt = trainer.prepare("parity_real", trainer.spec())
    given = {
        "tokens": TOKENS,
        "models": str(folder.parent),
        "expected": logits_of_transformers({folder.name: folder}),
    }
    torch.save(given, attempt.path / "expected.pt")
    trainer.finish(attempt, trainer.start(attempt, script=SCRIPT))
    found = json.loads((attempt.path / "found.json").read_text())["logits"]
    assert found[folder.name] < 1e-4


def test_loss_and_its_gradient_are_those_of_pytorch(ranks: dict[str, Any]) -> None:
    assert ranks["loss"] < 1e-5
    # The gradients are scaled by up to 9 here.
    assert ranks["gradient"] < 1e-5


@pytest.mark.parametrize("kind", ["linear", "capped_linear"])
def test_chunked_linear_and_cross_entropy_are_those_of_pytorch(ranks: dict[str, Any], kind: str) -> None:
    assert ranks[f"{kind}_loss"] < 1e-5
    assert ranks[f"{kind}_hidden"] < 1e-5
    assert ranks[f"{kind}_weight"] < 1e-4
    assert ranks[f"{kind}_evaluation"] == 0.0
    # Sums over 300 rows.
    assert ranks[f"{kind}_figures"] < 1e-3


def test_padding_of_the_vocabulary_is_never_chosen_and_gets_no_gradient(ranks: dict[str, Any]) -> None:
    assert ranks["padding_gradient"] == 0.0
    assert ranks["padded_loss"] < 1e-5


def test_a_packed_sample_does_not_see_its_neighbours(ranks: dict[str, Any]) -> None:
    assert ranks["neighbours_unchanged"]
    assert ranks["perturbed_changed"]
    assert ranks["packed_against_alone"] < 1e-4
