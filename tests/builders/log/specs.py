"""A spec, and the facts that submit reads about its model and its data."""

from __future__ import annotations

from sftd.domain.data.facts import DataFacts
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.data_section import Data
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.sections import Trainer
from sftd.domain.spec.spec import Spec
from sftd.wire.preflight import Preflight

LEASE = 30_000_000
SPEC = Spec(model=Model(partial_pretrain="m"), data=Data(train_files=["t"]), trainer=Trainer(max_steps=3))
SHAPE = ModelShape(
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
FACTS = DataFacts(
    files=["t"], digest="d", rows=1, tokens=1, trained_tokens=1, longest=1, truncated=0, unusable=0
)


def found(planned: int) -> Preflight:
    return Preflight(SHAPE, FACTS, None, planned, [])
