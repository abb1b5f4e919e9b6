"""Results compared with those that were recorded, where nobody computes each by hand: plans, and the values that each key of a
spec.

A change that is meant: `python -m tests.unit.test_recorded` records them again, and `git diff` shows what changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sftd.domain.errors import Refused
from sftd.domain.layout import DataFacts, ModelShape
from sftd.domain.pace import Machine
from sftd.domain.plan import Facts, make_plan
from sftd.domain.spec import Spec
from sftd.domain.spec_parse import LEAVES, parse
from tests.unit.test_plan import (
    CP,
    DEMO,
    EP,
    EXPERTS,
    H100,
    H200,
    LLAMA_1B,
    LLAMA_7B,
    PP,
    QWEN_600M,
    RMPAD,
    SP,
    TOKENS,
    TP,
    VPP,
    rows_of,
    spec_of,
)

GOLDEN = Path(__file__).parent / "golden"
EIGHT_CORES = Machine(device="cpu", name="cpu", cores=8)
UNKNOWN = Machine(device="cuda", name="NVIDIA GeForce RTX 4090")
A100 = Machine(device="cuda", name="NVIDIA A100-SXM4-80GB")
Given = list[tuple[str, Any]]
# Rows of many lengths, so that steps differ in their tokens.
MIXED = msgspec.structs.replace(
    DEMO,
    rows=3000,
    unusable=7,
    longest=2000,
    seen_squares=40_000_000,
    lengths=(3, 20, 40, 55, 80, 120, 600, 2000),
)
FULL: Given = [("model.enable_gradient_checkpointing", True)]
SELECTIVE: Given = [*FULL, ("model.recompute", "selective")]
BIAS = msgspec.structs.replace(LLAMA_1B, attention_bias=True, tie_word_embeddings=False)


def ranks(number: int) -> tuple[str, Any]:
    return "launch.nproc_per_node", number


PLANS: dict[str, tuple[Given, ModelShape, DataFacts, Machine]] = {
    "one GPU": ([], LLAMA_1B, rows_of(4096), H100),
    "bias": ([("training.micro_batch_size_per_gpu", 4)], BIAS, rows_of(512), H200),
    "FP32 on a GPU": ([("model.megatron.params_dtype", "float32")], LLAMA_1B, rows_of(4096), H100),
    "another GPU": ([ranks(2)], LLAMA_1B, MIXED, UNKNOWN),
    "deterministic": ([("training.deterministic", True), ranks(4)], QWEN_600M, rows_of(1000), A100),
    "deterministic and packed": ([("training.deterministic", True), RMPAD], QWEN_600M, MIXED, H100),
    "full": ([*FULL, ranks(2)], LLAMA_7B, rows_of(2048), H200),
    "selective": (SELECTIVE, QWEN_600M, rows_of(2048), H200),
    "packed": ([RMPAD, (TOKENS, 8192), ranks(2)], LLAMA_1B, MIXED, H100),
    "TP": ([(TP, 2), ranks(4)], LLAMA_1B, MIXED, H100),
    "TP and SP": ([(TP, 4), (SP, True), ranks(4), RMPAD], QWEN_600M, MIXED, H100),
    "PP": ([(PP, 4), ranks(8)], LLAMA_7B, MIXED, H100),
    "PP, packed": ([(PP, 2), ranks(4), RMPAD, *FULL], LLAMA_1B, MIXED, H100),
    "VPP": ([(PP, 2), (VPP, 4), ranks(2)], LLAMA_1B, rows_of(4096), H100),
    "CP": ([(CP, 2), ranks(4)], LLAMA_1B, MIXED, H100),
    "CP with normed keys": ([(CP, 4), (TP, 2), (SP, True), ranks(8), RMPAD], QWEN_600M, MIXED, H200),
    "experts": ([(EP, 2), ranks(2), *SELECTIVE], EXPERTS, MIXED, H100),
    "experts, TP": ([(TP, 2), (SP, True), ranks(2)], EXPERTS, rows_of(100), H100),
    "experts on CPUs": ([ranks(2)], EXPERTS, MIXED, EIGHT_CORES),
    "CPUs": ([ranks(2), ("launch.threads_per_rank", 3)], LLAMA_1B, MIXED, EIGHT_CORES),
    "more threads than cores": ([ranks(4), ("launch.threads_per_rank", 3)], LLAMA_1B, DEMO, EIGHT_CORES),
    "CPUs, BF16, packed": (
        [RMPAD, ("model.megatron.params_dtype", "bfloat16")],
        QWEN_600M,
        MIXED,
        EIGHT_CORES,
    ),
    "CPUs, PP and selective": ([(PP, 2), ranks(4), *SELECTIVE], LLAMA_1B, MIXED, EIGHT_CORES),
    "asynchronous": (
        [("checkpoint.async_save", True), ("trainer.save_interval", 2), ranks(2)],
        LLAMA_1B,
        rows_of(4096),
        H100,
    ),
    "validated": (
        [("trainer.val_check_interval", 3), ("data.val_files", ["v"]), ("trainer.val_before_train", False)],
        LLAMA_1B,
        rows_of(4096),
        H100,
    ),
}


def plans() -> dict[str, Any]:
    found = {}
    for name, (given, shape, data, machine) in PLANS.items():
        known = Facts(shape=shape, train=data, val=rows_of(700, rows=33), planned_steps=8)
        found[name] = make_plan(spec_of(*given), known, machine).as_json()
        later = msgspec.structs.replace(known, first_step=5, val=None)
        found[f"{name}, a fork"] = make_plan(spec_of(*given), later, machine, calibration=1.5).pace.total
    return found


def _leaves(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in _leaves(inner, f"{where}/{key}").items()}
    return {where: value}


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_plans_are_as_recorded() -> None:
    found, expected = _leaves(json.loads(json.dumps(plans()))), _leaves(recorded("plans"))
    assert found.keys() == expected.keys()
    for where, value in expected.items():
        if isinstance(value, float):
            assert found[where] == pytest.approx(value, rel=1e-9), where
        else:
            assert found[where] == value, where


MINIMAL = {"model": {"partial_pretrain": "/m"}, "data": {"train_files": ["/t"], "val_files": ["/v"]}}
PROBES: tuple[Any, ...] = (
    *(None, True, "", "x", [], ["x"], {}, {"x": 1}),
    *(-1_000_001, -1_000_000, -1, -0.5, 0, 1e-9, 0.5, 1, 1.0001, 2, 1.5),
    *(65535, 65536, 1_000_000, 1_000_001, 2**53, 2**53 + 1),
    *("auto", "cpu", "cuda", "float32", "bfloat16", "float16", "full", "selective", "none", "right", "left"),
    *("error", "stop", "skip", "rollback", "record", "constant", "linear", "cosine", "polynomial"),
    *("weights", "last", "all", "local", "slurm", "megatron-sft", "4:00:00"),
)


def _refuses(key: str, value: Any) -> bool:
    """Whether the value is refused where nothing else is set."""
    try:
        parse(MINIMAL, [(key, value)])
    except Refused as refused:
        return any(p.where == key for p in refused.problems)
    return False


def values() -> dict[str, Any]:
    default = msgspec.to_builtins(Spec())
    found = {}
    for key in sorted(LEAVES):
        node: Any = default
        for name in key.split("."):
            node = node[name]
        found[key] = {
            "default": node,
            "takes": " | ".join(json.dumps(v) for v in PROBES if not _refuses(key, v)),
        }
    return found


def test_each_key_takes_the_values_that_it_took() -> None:
    found, expected = json.loads(json.dumps(values())), recorded("spec_values")
    assert found.keys() == expected.keys()
    for key, entry in expected.items():
        # 1 is no true, and 1.0 no 1.
        assert repr(found[key]) == repr(entry), key


def write() -> None:
    """Record all of it again."""
    for name, make in RECORDED.items():
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in make().items())
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


RECORDED: dict[str, Callable[[], Any]] = {"plans": plans, "spec_values": values}


if __name__ == "__main__":
    write()
