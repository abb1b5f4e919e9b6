"""A stub run for the benchmarks of the daemon: its spec, the result of its preflight, and the events of its ranks."""

from __future__ import annotations

from sftd.domain.data.facts import DataFacts
from sftd.domain.log import events as e
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.sections import Launch, Trainer
from sftd.domain.spec.spec import Spec
from sftd.wire.preflight import Preflight


def spec(steps: int, launcher: str = "local") -> Spec:
    """A spec with one rank on one CPU core."""
    return Spec(
        model=Model(partial_pretrain="model"),
        data=Data(train_files=["data"]),
        trainer=Trainer(max_steps=steps),
        launch=Launch(
            launcher="slurm" if launcher == "slurm" else "local",
            device="cpu",
            nproc_per_node=1,
            threads_per_rank=1,
        ),
    )


def preflight(steps: int) -> Preflight:
    """The preflight of the smallest model and one row."""
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=1,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        vocab_size=1,
        max_position_embeddings=1,
        rms_norm_eps=1e-5,
        rope_theta=1.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=False,
        qk_norm=False,
    )
    facts = DataFacts(
        files=["data"], digest="d", rows=1, tokens=1, trained_tokens=1, longest=1, truncated=0, unusable=0
    )
    return Preflight(shape, facts, None, steps, [])


def step(number: int) -> e.StepCompleted:
    """A step as the ranks report it."""
    return e.StepCompleted(
        step=number,
        epoch=0,
        loss=1.0 / number,
        grad_norm=1.0,
        lr=1e-5,
        tokens=1,
        tokens_real=1,
        tokens_padded=1,
        tokens_total=number,
        samples=1,
        samples_digest="d" * 64,
        seconds=1.0,
    )


def checkpoint(number: int, folder: str) -> e.CheckpointPublished:
    """The checkpoint after a step."""
    return e.CheckpointPublished(
        step=number, path=f"{folder}/step-{number}", bytes=1, manifest_digest="d", seconds=0.1
    )
