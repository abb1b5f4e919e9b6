"""The experts of a rank in one autograd function. Parameters, checkpoints and exports stay those of Megatron's SequentialMLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.autograd import Function

from sftd.trainer.model.gradients import mark_accumulated
from sftd.trainer.model.grouped.activation import ACTIVATIONS, Activation, RowBias
from sftd.trainer.model.grouped.adapters import GroupedAdapters
from sftd.trainer.model.grouped.dispatch import Dispatcher
from sftd.trainer.model.grouped.products import GroupedProduct
from sftd.trainer.model.grouped.rows import ExpertRows, experts_of, spread
from sftd.trainer.model.recompute import computed_again

# Rows and weights of grouped products lie at multiples of 16 bytes.
_ALIGNED = 8


def are_grouped(device: torch.device) -> bool:
    """Whether experts on this device are computed together."""
    return device.type == "cuda"


def use_grouped_experts(model: GPTModel) -> None:
    """Have the layers of a built model compute their experts together, where the experts are what `GroupedExperts` computes."""
    for layer in model.decoder.layers:
        mixture = layer.mlp
        if isinstance(mixture, MoELayer) and _fits(mixture):
            mixture.experts.__class__ = GroupedExperts
            mixture.experts.recomputes = layer.recompute_input_layernorm
            mixture.experts.activation = ACTIVATIONS[mixture.config.model_shape.hidden_act]
            mixture.token_dispatcher.__class__ = Dispatcher


def _fits(mixture: MoELayer) -> bool:
    """A family's own kind of SequentialMLP computes the shape's activation too, with the products' biases."""
    experts, dispatcher = mixture.experts, mixture.token_dispatcher
    if not isinstance(experts, SequentialMLP) or type(dispatcher) is not MoEAlltoAllTokenDispatcher:
        return False
    linears = [
        linear for expert in experts.local_experts for linear in (expert.linear_fc1, expert.linear_fc2)
    ]
    return (
        mixture.config.model_shape.hidden_act in ACTIVATIONS
        and all(linear.weight.shape[1] % _ALIGNED == 0 for linear in linears)
        # Ranks that split an expert would each add its bias.
        and (dispatcher.tp_size == 1 or all(linear.bias is None for linear in linears))
        and dispatcher.shared_experts is None
    )


class GroupedExperts(SequentialMLP):
    """The experts of a rank: gate and up in one product, the activation times the weights of the rows, down."""

    # Whether backward makes the rows again that forward spread, from the tokens.
    recomputes: bool
    activation: Activation
    gate_up: GroupedProduct
    down: GroupedProduct
    # Parameters of the autograd function, and whether Megatron's hook needs a gradient of each.
    hooked: list[Any]
    is_hooked: bool

    def bind_parameters(self, *, is_hooked: bool) -> Iterator[GroupedAdapters]:
        """Find, or put, the experts' weights in one buffer, once Megatron has placed what is trained. Yields their adapters."""
        experts = list(self.local_experts)[::-1]
        self.gate_up = GroupedProduct([expert.linear_fc1 for expert in experts])
        self.down = GroupedProduct([expert.linear_fc2 for expert in experts])
        products = self.gate_up, self.down
        trained = [weight for product in products for weight in product.trained]
        adapters = [product.adapters for product in products if product.adapters is not None]
        # Without hooks one is enough for autograd to run backward: the function adds to the FP32 gradients itself.
        inside = [parameter for each in adapters for parameter in each.parameters()]
        self.is_hooked, self.hooked = is_hooked, trained if is_hooked else [*trained, *inside][:1]
        yield from adapters

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: ExpertRows, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows [n, h] in the order of the experts, where they end, and their weights FP32 [n] → weighted outputs [n, h]."""
        x, (ends, source) = permuted_local_hidden_states, tokens_per_expert
        with computed_again(x, spread, *source) if self.recomputes and source else nullcontext():
            return _Experts.apply(x, permuted_probs, ends, self, *self.hooked), None


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, ends: Tensor, experts: GroupedExperts, *hooked: Any
    ) -> Tensor:
        up, down = experts.gate_up, experts.down
        numbers = experts_of(ends, x.shape[0]) if up.bias is not None or down.bias is not None else None
        gate_up, z_up = up.forward(x, ends)
        activated = experts.activation.forward(gate_up, weights, _bias(up, numbers))
        y, z_down = down.forward(activated, ends)
        if bias := _bias(down, numbers):
            bias.add_to(y, weights)
        kept = x if up.keeps_input else None
        ctx.save_for_backward(kept, weights, ends, numbers, gate_up, z_up, z_down)
        ctx.experts, ctx.hooked = experts, hooked
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, ends, numbers, gate_up, z_up, z_down = ctx.saved_tensors
        experts, dy = ctx.experts, grads[0].contiguous()
        up, down = experts.gate_up, experts.down
        d_activated, dz = down.input_gradient(dy, ends)
        activated, d_gate_up, d_weights = experts.activation.backward(
            d_activated, gate_up, weights, _bias(up, numbers)
        )
        del d_activated
        if down.keeps_input:
            down.accumulate(activated, dy, z_down, dz, ends)
        if bias := _bias(down, numbers):
            bias.add_weight_gradient_to(d_weights, dy)
            down.bias.accumulate(weights[:, None].to(dy.dtype), dy, ends)
        if up.bias is not None:
            up.bias.accumulate(torch.ones_like(d_gate_up[:, :1]), d_gate_up, ends)
        del activated, dy
        dx, dz = None, None
        if ctx.needs_input_grad[0] or up.adapters is not None:
            dx, dz = up.input_gradient(d_gate_up, ends)
        if up.keeps_input:
            up.accumulate(x, d_gate_up, z_up, dz, ends)
        hooks = [mark_accumulated(weight) if experts.is_hooked else None for weight in ctx.hooked]
        return dx, d_weights, None, None, *hooks


def _bias(product: GroupedProduct, numbers: Tensor | None) -> RowBias | None:
    if product.bias is None or numbers is None:
        return None
    return RowBias(product.bias.values().contiguous(), numbers)


def bind_parameters(chunks: Iterable[GPTModel], *, is_hooked: bool = False) -> list[GroupedAdapters]:
    """Prepare grouped experts for training, or for answers. Call this once the weights are where they stay. `is_hooked`: Megatron
    reduces a gradient as soon as backward has it. Returns the experts' adapters."""
    return [
        adapters
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, GroupedExperts)
        for adapters in module.bind_parameters(is_hooked=is_hooked)
    ]
