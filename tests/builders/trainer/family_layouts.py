"""The layouts in which a model of each family is trained: for test_families.py, and for the table of docs/models.md."""

from __future__ import annotations

from typing import Any

from sftd.domain.errors import Problem
from sftd.domain.model.rules import MODEL
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec
from tests.builders.trainer.tiny_models import MODELS
from tests.builders.trainer.trainers import MEGATRON

# Five steps on one rank, padded, compared with transformers. The learning rate does not depend on their number.
ONE_RANK: dict[str, Any] = {
    "trainer__max_steps": 5,
    "scheduler__type": "constant",
    "trainer__save_interval": 0,
    "trainer__val_check_interval": 0,
    "trainer__val_before_train": False,
    "data__train_batch_size": 4,
    "data__val_files": [],
    "data__sequence_length": 64,
    "training__micro_batch_size_per_gpu": 2,
}
TP2, PP2, CP2, EP2 = (
    {f"{MEGATRON}{kind}_parallel_size": 2}
    for kind in ("tensor_model", "pipeline_model", "context", "expert_model")
)
# Two ranks each, packed, for two steps: the second one's loss depends on every gradient.
LAYOUTS: dict[str, dict[str, Any]] = {
    name: ONE_RANK | {"training__use_rmpad": True, "trainer__max_steps": 2} | layout
    for name, layout in {
        "TP": TP2,
        "TP+SP": TP2 | {MEGATRON + "sequence_parallel": True},
        "PP": PP2,
        "CP": CP2,
        "EP": EP2,
        "TP+SP+EP": TP2 | EP2 | {MEGATRON + "sequence_parallel": True},
    }.items()
}
# Architecture → its first model of `MODELS`.
FIRST: dict[str, str] = {}
for _name, (_architecture, _, _) in MODELS.items():
    FIRST.setdefault(_architecture, _name)


def spec_of(keys: dict[str, Any]) -> Spec:
    """A spec of two ranks with these `keys`."""
    needed = {"model__partial_pretrain": "model", "data__train_files": ["train"], "launch__nproc_per_node": 2}
    return parse({}, [(key.replace("__", "."), value) for key, value in (needed | keys).items()])[0]


def refusal(shape: ModelShape, keys: dict[str, Any]) -> list[Problem]:
    """Why two ranks with these `keys` may not train a model."""
    return MODEL.problems(spec_of(keys), shape)
