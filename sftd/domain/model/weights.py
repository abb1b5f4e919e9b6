"""The weights of a model under the names of its Hugging Face folder, and which of them a run trains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from sftd.domain.model.families import FAMILIES
from sftd.domain.model.family import Family
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Megatron, Model

LAYERS, EMBEDDING, FINAL_NORM, OUTPUT = (
    "model.layers",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)
# The projections of a layer, by Megatron's matrix products: one product computes several of them.
PRODUCTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
# Values of a row that share a scale in NF4.
NF4_BLOCK = 64


class Weight(NamedTuple):
    """A weight of a decoder layer. `name` is relative to the layer; `{}` in it stands for the number of an expert. It has `rows`
    × `columns` elements (one column: a vector). Tensor-parallel ranks split its rows or columns (`cut`). `projection` is its
    name in `model.lora.targets`. It is `share` of a tensor of the folder, where several weights are one. `is_joined`: the tensor
    holds those of all experts. `is_buffer`: it is never trained, and kept in FP32."""

    name: str
    rows: int
    columns: int = 1
    cut: Literal["", "rows", "columns"] = ""
    projection: str = ""
    share: float = 1.0
    is_buffer: bool = False
    is_joined: bool = False

    @property
    def is_expert(self) -> bool:
        """Whether each expert has one."""
        return self.is_joined or "{}" in self.name


def layer_weights(shape: ModelShape, layer: int = -1) -> list[Weight]:
    """The weights of a decoder layer (default: the last, which stands for most), without those that only one family has
    (`Family.added`)."""
    h, d = shape.hidden_size, shape.head_dim
    heads, groups = shape.num_attention_heads * d, shape.num_key_value_heads * d
    family = FAMILIES[shape.architecture]
    found = [
        *(Weight(f"{norm}.weight", h) for norm in family.norms),
        *_joined(
            f"self_attn.{family.fused['qkv']}" if "qkv" in family.fused else "",
            Weight("self_attn.q_proj.weight", shape.query_heads * d, h, "rows", "q"),
            Weight("self_attn.k_proj.weight", groups, h, "rows", "k"),
            Weight("self_attn.v_proj.weight", groups, h, "rows", "v"),
        ),
        Weight("self_attn.o_proj.weight", h, heads, "columns", "o"),
    ]
    if shape.attention_bias:
        sizes = {"q": heads, "k": groups, "v": groups}
        found += [Weight(f"self_attn.{name}_proj.bias", size, 1, "rows") for name, size in sizes.items()]
    if shape.output_bias:
        found.append(Weight("self_attn.o_proj.bias", h))
    if shape.attention_sinks:
        found.append(Weight("self_attn.sinks", shape.num_attention_heads, 1, "rows"))
    if shape.qk_norm_over_heads:
        found += [
            Weight("self_attn.q_norm.weight", heads, 1, "rows"),
            Weight("self_attn.k_norm.weight", groups, 1, "rows"),
        ]
    elif shape.qk_norm:
        found += [Weight("self_attn.q_norm.weight", d), Weight("self_attn.k_norm.weight", d)]
    if layer in shape.delta_layers:
        found = found[: len(family.norms)] + _delta_net(shape)
    if shape.kv_lora_rank:
        found = found[: len(family.norms)] + _latent_attention(shape)
    below = family.feed_forward
    if family.joined_experts:
        return [*found, *_joined_experts(shape, below)]
    if not shape.has_experts(range(shape.num_hidden_layers)[layer]):
        return [*found, *_gated(family, below, shape.intermediate_size, h)]
    found.append(Weight(f"{below}.gate.weight", shape.num_experts, h))
    if shape.router == "sigmoid":
        found.append(Weight(f"{below}.gate.e_score_correction_bias", shape.num_experts, is_buffer=True))
    if shape.shared_expert_intermediate_size:
        shared = f"{below}.{family.shared_expert}"
        found += _gated(family, shared, shape.shared_expert_intermediate_size, h)
        if shape.shared_expert_gate:
            found.append(Weight(f"{shared}_gate.weight", 1, h))
    return [*found, *_gated(family, f"{below}.experts.{{}}", shape.moe_intermediate_size, h)]


def _gated(family: Family, below: str, f: int, h: int) -> list[Weight]:
    """A gated MLP of `f` units, or an expert."""
    gate, up, down = family.projections
    return [
        *_joined(
            f"{below}.{family.fused['gate_up']}" if "gate_up" in family.fused else "",
            Weight(f"{below}.{gate}.weight", f, h, "rows", "gate"),
            Weight(f"{below}.{up}.weight", f, h, "rows", "up"),
        ),
        Weight(f"{below}.{down}.weight", h, f, "columns", "down"),
    ]


def _latent_attention(shape: ModelShape) -> list[Weight]:
    """Every rank holds the projections to the latent dimensions whole."""
    h, heads, r = shape.hidden_size, shape.num_attention_heads, shape.qk_rope_head_dim
    latent, keyed = shape.kv_lora_rank, shape.head_dim - r + shape.v_head_dim
    queries = shape.q_lora_rank
    name = "self_attn.q_b_proj.weight" if queries else "self_attn.q_proj.weight"
    found = [Weight(name, heads * shape.head_dim, queries or h, "rows", "q")]
    if queries:
        found += [
            Weight("self_attn.q_a_proj.weight", queries, h),
            Weight("self_attn.q_a_layernorm.weight", queries),
        ]
    return [
        *found,
        Weight("self_attn.kv_a_proj_with_mqa.weight", latent + r, h),
        Weight("self_attn.kv_a_layernorm.weight", latent),
        Weight("self_attn.kv_b_proj.weight", heads * keyed, latent, "rows"),
        Weight("self_attn.o_proj.weight", h, heads * shape.v_head_dim, "columns", "o"),
    ]


def _joined_experts(shape: ModelShape, below: str) -> list[Weight]:
    """The router and the experts of gpt-oss."""
    h, f, count = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    gate_up, down = f"{below}.experts.gate_up_proj", f"{below}.experts.down_proj"
    return [
        Weight(f"{below}.router.weight", count, h),
        Weight(f"{below}.router.bias", count),
        *(Weight(gate_up, f, h, "rows", name, 0.5, is_joined=True) for name in ("gate", "up")),
        Weight(f"{gate_up}_bias", 2 * f, 1, "rows", is_joined=True),
        Weight(down, h, f, "columns", "down", is_joined=True),
        Weight(f"{down}_bias", h, is_joined=True),
    ]


def _delta_net(shape: ModelShape) -> list[Weight]:
    """What a gated delta net has in the place of attention."""
    h, heads = shape.hidden_size, shape.delta_value_heads
    values = heads * shape.delta_value_dim
    convolved = 2 * shape.delta_key_heads * shape.delta_key_dim + values
    fused = FAMILIES[shape.architecture].fused
    sizes = {"qkv": convolved, "z": values, "b": heads, "a": heads}
    if "qkvz" in fused:
        sizes = {"qkvz": convolved + values, "ba": 2 * heads}
    return [
        *(Weight(f"linear_attn.in_proj_{name}.weight", rows, h, "rows") for name, rows in sizes.items()),
        Weight("linear_attn.conv1d.weight", convolved, shape.delta_kernel, "rows"),
        Weight("linear_attn.A_log", heads, 1, "rows"),
        Weight("linear_attn.dt_bias", heads, 1, "rows"),
        Weight("linear_attn.norm.weight", shape.delta_value_dim),
        Weight("linear_attn.out_proj.weight", h, values, "columns", "o"),
    ]


def _joined(name: str, *parts: Weight) -> list[Weight]:
    """The parts; with a name, as parts of the one tensor that they are in the folder."""
    rows = sum(part.rows for part in parts)
    if not name:
        return list(parts)
    return [part._replace(name=f"{name}.weight", share=part.rows / rows) for part in parts]


def adapted_products(shape: ModelShape) -> list[list[Weight]]:
    """The weights of a layer that may get adapters, by the product that computes them."""
    found: dict[tuple[str, str], list[Weight]] = {}
    for weight in layer_weights(shape):
        for product, projections in PRODUCTS.items():
            if weight.projection in projections:
                found.setdefault((product, weight.name.rsplit(".", 2)[0]), []).append(weight)
    return list(found.values())


def layer_kinds(shape: ModelShape) -> list[tuple[list[Weight], list[int]]]:
    """Weights of each kind of layer, and the numbers of the layers of that kind."""
    found: dict[tuple[Weight, ...], list[int]] = {}
    for layer in range(shape.num_hidden_layers):
        found.setdefault(tuple(layer_weights(shape, layer)), []).append(layer)
    return [(list(weights), layers) for weights, layers in found.items()]


def stage_layers(m: Megatron, layers: int, stage: int) -> list[int]:
    """Numbers of the layers of a pipeline stage: one run of them, or one for each virtual stage."""
    pp, vpp = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    each = layers // (pp * vpp)
    return [chunk * pp * each + stage * each + number for chunk in range(vpp) for number in range(each)]


def frozen(expressions: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names of weights in which one of the regular expressions of `model.freeze` matches, anywhere."""
    compiled = [re.compile(expression) for expression in expressions]
    return [name for name in names if any(expression.search(name) for expression in compiled)]


def frozen_shares(model: Model, shape: ModelShape) -> Mapping[tuple[int, str], float]:
    """(layer, name of a `Weight`) → share of its elements that `model.freeze` freezes, which is below 1 only where some experts
    are frozen; weights outside of the layers are at layer -1. Weights that are trained are left out."""
    if not model.frozen:
        return {}
    return _frozen_shares(tuple(model.frozen), msgspec.json.encode(shape))


# A search plans thousands of layouts of one model. A shape with RoPE scaling has no hash.
@lru_cache(maxsize=16)
def _frozen_shares(expressions: tuple[str, ...], encoded: bytes) -> dict[tuple[int, str], float]:
    places = list(folder_names(msgspec.json.decode(encoded, type=ModelShape)))
    chosen = set(frozen(expressions, (full_name for _, _, full_name, _ in places)))
    found: dict[tuple[int, str], float] = {}
    for layer, name, full_name, share in places:
        if full_name in chosen:
            found[layer, name] = found.get((layer, name), 0.0) + share
    return found


def idle_layers(model: Model, shape: ModelShape) -> int:
    """Number of the first layers that need no backward, because nothing is trained in them or before them."""
    shares = frozen_shares(model, shape)
    if (-1, EMBEDDING) not in shares:
        return 0
    layers = range(shape.num_hidden_layers)
    # The shares of all experts add up to almost 1.
    is_trained = (
        any(
            shares.get((layer, weight.name), 0.0) < 0.999
            for weight in layer_weights(shape, layer)
            if not weight.is_buffer
        )
        for layer in layers
    )
    return next((layer for layer, found in zip(layers, is_trained, strict=True) if found), len(layers))


def folder_names(shape: ModelShape) -> Iterator[tuple[int, str, str, float]]:
    """Every weight of the folder: (layer or -1, name of its `Weight`, its name in the folder, its share of that `Weight`)."""
    for name in (EMBEDDING, FINAL_NORM, *(() if shape.tie_word_embeddings else (OUTPUT,))):
        yield -1, name, name, 1.0
    for layer in range(shape.num_hidden_layers):
        for weight in layer_weights(shape, layer):
            count = shape.num_experts if "{}" in weight.name else 1
            for number in range(count):
                full_name = f"{LAYERS}.{layer}.{weight.name.replace('{}', str(number))}"
                yield layer, weight.name, full_name, weight.share / count
