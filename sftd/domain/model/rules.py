"""Rules for a model under a spec: the trainer must support it, and its sizes must fit the spec's layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import takewhile

import msgspec

from sftd.domain.errors import Problem, quote, shorten
from sftd.domain.model import adapter_rules
from sftd.domain.model.families import FAMILIES
from sftd.domain.model.files import ModelFiles, differences
from sftd.domain.model.parameters import held
from sftd.domain.model.shape import ModelShape
from sftd.domain.rules import Rules
from sftd.domain.spec.spec import Spec

_MODEL = "model.partial_pretrain"
_LENGTH = "data.sequence_length"
_MEGATRON = "model.megatron."
_EP = _MEGATRON + "expert_model_parallel_size"
_RECIPE = 'docs/architecture.md, "A model family"'
# A name comes from a file of the user.
_LONGEST_NAME = 100


def check_architecture(name: str) -> Problem | None:
    """Check that an architecture of config.json (empty if it names none) is supported. The other rules need its shape."""
    if name in FAMILIES:
        return None
    what = f"{shorten(name)} is not supported" if name else "config.json names no architecture"
    if near := nearest_family(name):
        what += f"; the nearest supported family is {near}"
    known = ", ".join(family.model_type for family in FAMILIES.values())
    fix = f"use a supported model (docs/models.md: {known}), or add the family ({_RECIPE})"
    return Problem(_MODEL, what, fix)


def nearest_family(architecture: str) -> str | None:
    """The supported architecture of the same name before its version (`Qwen3VLForConditionalGeneration`: Qwen), with the most
    similar version and variant. None if no name is the same."""
    name = _stem(architecture)

    def similarity(known: str) -> tuple[int, float]:
        stem = _stem(known)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(name, stem, strict=False))
        return len(list(same)), SequenceMatcher(a=name, b=stem).ratio()

    related = [known for known in FAMILIES if name and _word(_stem(known)) == _word(name)]
    return max(related, key=similarity, default=None)


def _stem(architecture: str) -> str:
    """`Qwen3MoeForCausalLM` → `qwen3moe`."""
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture[:_LONGEST_NAME]).lower()


def _word(stem: str) -> str:
    return re.split(r"[\d_]", stem, maxsplit=1)[0]


def unsupported_parts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The trainer does not compute everything that config.json can request."""
    for part in shape.unsupported:
        what = f"config.json has {part}, which sftd does not support for {shape.architecture}"
        yield Problem(_MODEL, what, "use a model without it")


def expert_parallel_without_experts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Expert parallelism shards only experts."""
    ep = spec.model.megatron.expert_model_parallel_size
    if ep > 1 and not shape.num_experts:
        yield Problem(_EP, f"{ep}, but {shape.architecture} has no experts to shard", "set it to 1")


def router_keys_without_router(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Only a mixture of experts has routers."""
    model = spec.model
    asked = {"freeze_router": model.freeze_router}
    asked |= {f"moe.{key}": value > 0 for key, value in msgspec.to_builtins(model.moe).items()}
    for key in [key for key, is_set in asked.items() if is_set and not shape.num_experts]:
        yield Problem(f"model.{key}", f"is set, but {shape.architecture} has no router", "leave it out")


def experts_of_a_token(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The router needs a choice: with a single expert, whose weight is normalised to 1, it gets no gradient."""
    least = 2 if shape.norm_topk_prob else 1
    if shape.num_experts and not least <= shape.num_experts_per_tok <= shape.num_experts:
        what = f"config.json routes a token to {shape.num_experts_per_tok} of {shape.num_experts} experts"
        fix = f"use a model with {least} to {shape.num_experts} (num_experts_per_tok)"
        yield Problem(_MODEL, what, fix)


def groups_of_experts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """A group is chosen by its two best experts, and the chosen groups hold all experts of a token."""
    groups, chosen = shape.router_groups, shape.router_topk_group
    if not shape.num_experts or chosen >= groups:
        return
    each, rest = divmod(shape.num_experts, groups)
    if rest or each < 2 or chosen * each < shape.num_experts_per_tok:
        what = (
            f"config.json routes a token to {shape.num_experts_per_tok} experts in {chosen} of {groups} groups "
            f"(n_group, topk_group), but {shape.num_experts} experts do not allow that"
        )
        yield Problem(
            _MODEL, what, "use a model whose groups have equal sizes of at least 2 and enough experts"
        )


def experts_not_divided(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Each rank holds the same number of experts."""
    ep, experts = spec.model.megatron.expert_model_parallel_size, shape.num_experts
    if experts % ep:
        sizes = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        yield Problem(_EP, f"{ep} does not divide the model's {experts} experts", f"use one of {sizes}")


def experts_of_a_whole_sequence(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Tensor-parallel ranks send each token to its experts once."""
    m = spec.model.megatron
    if shape.num_experts and m.tensor_model_parallel_size > 1 and not m.sequence_parallel:
        what = (
            "is off, but experts need it with tensor parallelism: "
            "otherwise each tensor-parallel rank would send the same tokens to the experts"
        )
        fix = "turn it on, or set model.megatron.tensor_model_parallel_size to 1"
        yield Problem(_MEGATRON + "sequence_parallel", what, fix)


def biased_experts_split(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Each rank that holds a part of an expert would add its bias."""
    m = spec.model.megatron
    if shape.expert_bias and m.expert_tensor_parallel_size > 1:
        what = f"is 1, but tensor parallelism cannot split the experts of {shape.architecture}, which have biases"
        yield Problem(_EP, what, f"set it to {m.tensor_model_parallel_size}")


def other_activation(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The trainer supports only some activations of a family's feed-forward layers."""
    known = FAMILIES[shape.architecture].activations
    if shape.hidden_act not in known:
        what = f"config.json has hidden_act {quote(shape.hidden_act)}"
        yield Problem(_MODEL, what, f"use a model with {' or '.join(known)} layers")


def other_rope(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The trainer supports only some RoPE scalings."""
    known = FAMILIES[shape.architecture].rope_types
    if shape.rope_type not in known:
        what = f"RoPE scaling {quote(shape.rope_type)} is not supported"
        yield Problem(_MODEL, what, f"use {' or '.join(known)} RoPE")


def delta_net_over_context(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The recurrence of a gated delta net goes through all tokens of a sample."""
    cp = spec.model.megatron.context_parallel_size
    if shape.delta_layers and cp > 1:
        what = (
            f"{cp}, but {shape.architecture} has gated delta nets, "
            "whose recurrence sftd does not split over context-parallel ranks"
        )
        yield Problem(_MEGATRON + "context_parallel_size", what, "set it to 1, and use tensor parallelism")


def quantized_delta_net(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The projection of a gated delta net holds its decays, which four bits change by more than the other values."""
    if shape.delta_layers and spec.model.quantize != "none":
        what = f"is {spec.model.quantize}, which sftd does not support for the gated delta nets of {shape.architecture}"
        yield Problem("model.quantize", what, "set it to none")


def quantized_latent_attention(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """No test covers the projections of latent attention in four bits."""
    if shape.kv_lora_rank and spec.model.quantize != "none":
        what = f"is {spec.model.quantize}, which sftd does not support for the latent attention of {shape.architecture}"
        yield Problem("model.quantize", what, "set it to none")


def layers_not_divided_by_tp(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Tensor-parallel ranks hold equal parts of each layer."""
    tp = spec.model.megatron.tensor_model_parallel_size
    has_dense_layers = not shape.num_experts or bool(shape.layers_without_experts)
    # Expert parallelism does not split an expert.
    splits_experts = spec.model.megatron.expert_model_parallel_size == 1
    numbers = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_key_value_heads,
        "FFN units": shape.intermediate_size if has_dense_layers else 0,
        "units of an expert": shape.moe_intermediate_size if splits_experts else 0,
        "units of the shared expert": shape.shared_expert_intermediate_size,
    }
    if shape.delta_layers:
        numbers["key heads of gated delta nets"] = shape.delta_key_heads
    sizes = ", ".join(str(n) for n in range(1, 65) if all(number % n == 0 for number in numbers.values()))
    for part, number in numbers.items():
        if number % tp:
            what = f"{tp} does not divide the model's {number} {part}"
            yield Problem(_MEGATRON + "tensor_model_parallel_size", what, f"use one of {sizes}")


def layers_not_divided_by_pp(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Each pipeline stage has the same number of layers."""
    m, layers = spec.model.megatron, shape.num_hidden_layers
    pp, vpp = m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1
    if layers % (pp * vpp):
        key = "virtual_pipeline_model_parallel_size" if vpp > 1 else "pipeline_model_parallel_size"
        what = f"PP {pp} × VPP {vpp} = {pp * vpp} does not divide the model's {layers} layers"
        yield Problem(_MEGATRON + key, what, "use sizes whose product divides the layers")


def stage_without_experts(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """Experts have an optimizer of their own, which all stages or none must have."""
    stages = spec.model.megatron.pipeline_model_parallel_size
    if shape.num_experts and shape.num_hidden_layers % stages == 0:
        trained = [held(spec, shape, stage).experts for stage in range(stages)]
        if any(trained) and not all(trained):
            what = f"stage {trained.index(0)} of {stages} trains no experts, but another one does"
            yield Problem(_MEGATRON + "pipeline_model_parallel_size", what, "use fewer stages")


def longer_than_pretrained(spec: Spec, shape: ModelShape) -> Iterator[Problem]:
    """The model was not pretrained on later positions."""
    length, positions = spec.data.sequence_length, shape.max_position_embeddings
    if length > positions:
        yield Problem(_LENGTH, f"{length} is more than the {positions} positions the model was trained on")


MODEL = Rules(
    refuse=(
        unsupported_parts,
        expert_parallel_without_experts,
        router_keys_without_router,
        experts_of_a_token,
        groups_of_experts,
        experts_not_divided,
        experts_of_a_whole_sequence,
        biased_experts_split,
        other_activation,
        other_rope,
        delta_net_over_context,
        quantized_delta_net,
        quantized_latent_attention,
        layers_not_divided_by_tp,
        layers_not_divided_by_pp,
        stage_without_experts,
        *adapter_rules.ADAPTERS.refuse,
    ),
    warn=(longer_than_pretrained, *adapter_rules.ADAPTERS.warn),
)


def changed_files(
    was: ModelFiles | None,
    now: ModelFiles | None,
    spec: Spec,
    *,
    weights: bool,
    fix: str,
    run: str = "the run",
) -> list[Problem]:
    """A problem for each file in the model folder of `spec` that changed since `run` was submitted. Only the last one has
    `fix`. Without a record (None) nothing is compared. `weights`: compare the weight files too."""
    if was is None or now is None:
        return []
    found = differences(was, now, weights=weights, code=spec.model.trust_remote_code)
    problems = [
        Problem(_MODEL, f"{spec.model.partial_pretrain}/{name} changed since {run} was submitted: {detail}")
        for name, detail in found.items()
    ]
    return [*problems[:-1], *(msgspec.structs.replace(last, fix=fix) for last in problems[-1:])]
