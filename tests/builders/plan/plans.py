"""Specs, data and machines that plans are made for."""

from __future__ import annotations

from typing import Any

from sftd.domain.data.facts import LENGTH_QUANTILES, DataFacts
from sftd.domain.plan.duration import Machine
from sftd.domain.spec.parse import parse
from sftd.domain.spec.spec import Spec

H100 = Machine(device="cuda", name="NVIDIA H100 80GB HBM3")
H200 = Machine(device="cuda", name="NVIDIA H200")
TWO_CORES = Machine(device="cpu", name="cpu", cores=2)
TP, PP, VPP, CP, EP = (
    f"model.megatron.{name}_parallel_size"
    for name in (
        "tensor_model",
        "pipeline_model",
        "virtual_pipeline_model",
        "context",
        "expert_model",
    )
)
SP = "model.megatron.sequence_parallel"


def spec_of(*given: tuple[str, Any], batch: int = 16, length: int = 4096) -> Spec:
    config = {
        "model": {"partial_pretrain": "m"},
        "data": {"train_files": ["t"], "train_batch_size": batch, "sequence_length": length},
        "trainer": {"max_steps": 8},
    }
    return parse(config, given)[0]


def rows_of(length: int, rows: int = 1000) -> DataFacts:
    """Rows of one length, all but the first token trained."""
    return DataFacts(
        files=["t"],
        digest="",
        rows=rows,
        tokens=rows * length,
        trained_tokens=rows * (length - 1),
        longest=length,
        truncated=0,
        unusable=0,
        seen_tokens=rows * length,
        seen_squares=rows * length**2,
        lengths=(length,) * len(LENGTH_QUANTILES),
    )


# The data of the demo: 3,287 questions and answers out of Python's standard library.
DEMO = DataFacts(
    files=["t"],
    digest="",
    rows=3287,
    tokens=208202,
    trained_tokens=52006,
    longest=134,
    truncated=0,
    unusable=0,
    seen_tokens=208202,
    seen_squares=13629580,
)
RMPAD, TOKENS = ("training.use_rmpad", True), "training.micro_batch_tokens"
