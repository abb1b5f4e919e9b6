"""A model family that sftd does not have: a Llama with a bias on all of attention, under names of its own.

`register` is all that it takes: an entry and a module. As a program it is what test_families.py runs: under torchrun it
publishes the model as it was loaded and trains two steps; with more arguments it is `sftd export`'s tool.
"""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace
from typing import Any

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.family import Family, Key

TOY = Family(
    architecture="ToyForCausalLM",
    model_type="toy",
    fields={"attention_bias": True, "intermediate_size": Key(int, ("ffn_dim",))},
    refused=(),
    # The bias of the output projection.
    added=lambda shape, tp: shape.hidden_size,
)
# Llama's name of a tensor → the toy's, below the layer and outside of it.
LAYER = {
    "input_layernorm": "norm1",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "post_attention_layernorm": "norm2",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
OUTSIDE = {"model.embed_tokens": "toy.embed", "model.norm": "toy.norm", "lm_head": "toy.head"}
ROWS = [
    ([3, 4, 5, 6, 7, 0], [-100, -100, 5, 6, 7, 0]),
    ([8, 7, 3, 0], [-100, 7, 3, 0]),
    ([5, 5, 6, 4, 8, 3, 0], [-100, -100, -100, -100, 8, 3, 0]),
]
LR = 0.01


def toy_name(name: str) -> str:
    """The toy's name of Llama's tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"toy.blocks.{number}.{LAYER[part]}.{kind}"


def register() -> None:
    """Make the family known, as a new file and a new entry would."""
    import torch

    from sftd.trainer.model.families.rules import GROUPED, STACKED, Rule
    from sftd.trainer.model.families.seam import TrainedFamily
    from sftd.trainer.model.layer import DecoderLayer, decoder_layer

    class ToyLayer(DecoderLayer):
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            bias: Any = torch.nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
            bias.sequence_parallel = config.sequence_parallel
            self.output_bias = bias

        def project(self, attended: torch.Tensor) -> torch.Tensor:
            return super().project(attended) + self.output_bias

    qkv = [f"attn.{part}" for part in "qkv"]
    rules = [
        Rule("input_layernorm.weight", ("norm1.weight",)),
        Rule("self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in qkv), "rows", GROUPED),
        Rule("self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in qkv), "rows", GROUPED),
        Rule("self_attention.linear_proj.weight", ("attn.o.weight",), "columns"),
        Rule("output_bias", ("attn.o.bias",)),
        Rule("pre_mlp_layernorm.weight", ("norm2.weight",)),
        Rule("mlp.linear_fc1.weight", ("ffn.gate.weight", "ffn.up.weight"), "rows", STACKED),
        Rule("mlp.linear_fc2.weight", ("ffn.down.weight",), "columns"),
    ]
    family = TrainedFamily(
        layer_rules=lambda shape, layer, experts: rules,
        layer_spec=lambda shape, layer: decoder_layer(shape, ToyLayer),
        layers="toy.blocks",
        embedding="toy.embed.weight",
        final_norm="toy.norm.weight",
        output="toy.head.weight",
    )
    FAMILIES[TOY.architecture] = TOY
    sys.modules["sftd.trainer.model.families.toy"] = SimpleNamespace(FAMILY=family)  # type: ignore[assignment]


def train(path: str) -> None:
    """Of each rank: publish what was loaded, then leave loss and gradient norm of two steps in found.json."""
    import numpy as np

    from sftd.trainer import trainee as trainees
    from sftd.trainer.checkpoint.checkpoints import Checkpoints, Progress
    from sftd.trainer.data.batches import Batching
    from sftd.trainer.data.rows import Sample
    from sftd.trainer.runtime import session as sessions
    from sftd.trainer.runtime.reporter import Reporter
    from sftd.wire.attempt.directory import AttemptDir
    from sftd.wire.model.folder import read_shape

    attempt = AttemptDir(path)
    order = attempt.order()
    session = sessions.start(order.spec)
    trainee = trainees.load(
        order.spec, read_shape(order.spec.model.partial_pretrain, {}), session, pretrained=True
    )
    reporter = Reporter(attempt, session.layout.reports)
    Checkpoints(order, session, trainee, reporter).save(
        Progress(1, 1, math.nan, math.nan), {}, must_succeed=True
    )
    samples = [Sample(np.array(ids), np.array([*labels[1:], -100])) for ids, labels in ROWS]
    batch = Batching.of(order.spec, session).make(samples, 8)
    steps = [trainee.step([batch], divisor=batch.trained, learning_rate=LR) for _ in range(2)]
    if session.layout.reports:
        found = {
            "steps": [[sums[0].item(), norm.item()] for sums, norm in steps],
            "parameters": trainee.parameters,
            "held": sum(p.numel() for chunk in trainee.chunks for p in chunk.parameters()),
        }
        (attempt.path / "found.json").write_text(json.dumps(found))
    reporter.close()
    sessions.close()


if __name__ == "__main__":
    from sftd.trainer.runtime import process

    process.prepare()
    register()
    if len(sys.argv) == 2:
        train(sys.argv[1])
    else:
        from sftd.trainer.tools.export.__main__ import main

        sys.exit(main(sys.argv[1:]))
