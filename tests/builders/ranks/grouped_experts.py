"""Run by test_experts.py, and by tests/gpu on a GPU (`cuda` as its argument): a layer's experts computed together, forward and
backward, against one expert after the other in plain PyTorch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sftd.trainer.runtime import process

process.prepare()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sftd.trainer.model.adapters.linears import Adapter, Adapters  # noqa: E402
from sftd.trainer.model.grouped.activation import ACTIVATIONS  # noqa: E402
from sftd.trainer.model.grouped.experts import _Experts  # noqa: E402
from sftd.trainer.model.grouped.products import GroupedProduct  # noqa: E402
from sftd.trainer.model.grouped.rows import Collect, Spread, rows_of_tokens  # noqa: E402
from sftd.trainer.model.quantize.nf4 import Quantized  # noqa: E402

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
HIDDEN, WIDTH, RANK, SCALE = 64, 128, 3, 1.5


@dataclass
class Case:
    """`load`: how tokens choose among the experts. `apart`: weights at unequal distances in memory. `hooked`: Megatron's hooks
    are to run for all weights. `biased`: the products have biases."""

    tokens: int
    experts: int
    taken: int
    load: str = "random"
    apart: bool = False
    hooked: bool = False
    biased: bool = False
    hidden_act: str = "silu"
    adapted: bool = False
    quantized: bool = False
    dtype: torch.dtype = torch.float32
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype).to(DEVICE)

    def routing(self) -> Tensor:
        """bool [tokens, experts]."""
        scores = torch.rand(self.tokens, self.experts, generator=self.generator)
        if self.load == "few":
            # Only the last of the experts, so that the first are empty.
            scores[:, : self.experts - self.taken - 1] = -1.0
        if self.load == "one":
            scores[:, 1] = 2.0
        chosen = scores.topk(self.taken, dim=1).indices
        return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True).to(DEVICE)


def linears(case: Case, height: int, width: int) -> tuple[list[Any], Tensor]:
    """Stand-ins of the experts' products in ascending order, and the values of their weights."""
    gap = 64 * case.apart
    buffer = case.random(case.experts * (height * width + gap) + 8 * case.experts)
    gradients = torch.randn(buffer.shape, generator=case.generator).to(DEVICE)
    found, start = [], 0
    values = torch.empty(case.experts, height, width, dtype=case.dtype, device=DEVICE)
    # As Megatron places them: the last expert first.
    for number in reversed(range(case.experts)):
        place = slice(start, start + height * width)
        start += height * width + gap * (number % 2)
        weight: Any = torch.nn.Parameter(buffer[place].view(height, width) * 0.3)
        weight.data = buffer[place].view(height, width).mul_(0.3)
        linear = SimpleNamespace(weight=weight, bias=None)
        values[number] = weight.detach()
        if case.quantized:
            weight.requires_grad_(False)
            stored = Quantized(weight.shape, DEVICE)
            stored.fill(weight)
            values[number] = stored.dequantize(case.dtype)
            linear.weight = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
            linear.weight.quantized = stored
        elif not case.adapted:
            weight.main_grad = gradients[place].view(height, width)
        if case.biased:
            linear.bias = torch.nn.Parameter(case.random(height))
            linear.bias.main_grad = torch.randn(height, generator=case.generator).to(DEVICE)
        if case.adapted:
            linear.adapters = adapters(case, linear.weight, height, width)
        found.insert(0, linear)
    return found, values


def adapters(case: Case, weight: Tensor, height: int, width: int) -> Adapters:
    found = Adapters()
    names = ("gate", "up") if height == 2 * WIDTH else ("down",)
    found.scale, found.groups, found.dropout = SCALE, 1, None
    each = height // len(names)
    found.rows = {name: (number * each, each) for number, name in enumerate(names)}
    for name in names:
        found[name] = Adapter((RANK, width), (each, RANK), weight)
    for parameter in found.parameters():
        parameter.data = case.random(*parameter.shape) * 0.3
        parameter.main_grad = torch.randn(parameter.shape, generator=case.generator).to(DEVICE)
    return found


def together(
    case: Case, ups: list[Any], downs: list[Any], inputs: list[Tensor], taken: Tensor
) -> list[Tensor]:
    """Output, and the gradients of tokens and weights of the experts."""
    products = [GroupedProduct(each[::-1]) for each in (ups, downs)]
    hooked = [weight for product in products for weight in product.trained] if case.hooked else []
    experts: Any = SimpleNamespace(
        gate_up=products[0], down=products[1], activation=ACTIVATIONS[case.hidden_act], is_hooked=case.hooked
    )
    tokens, weights, d_out = (x.clone().requires_grad_() for x in inputs)
    is_async = DEVICE.type == "cuda" and case.dtype == torch.bfloat16
    if is_async:
        # Waiting for the device is an error from here on.
        torch.cuda.set_sync_debug_mode("error")
    slots, ends = rows_of_tokens(taken, case.taken, case.experts)
    x, row_weights = Spread.apply(tokens, weights, taken, slots)
    out = Collect.apply(_Experts.apply(x, row_weights, ends, experts, *hooked), slots)
    out.backward(d_out.detach())
    if is_async:
        torch.cuda.set_sync_debug_mode("default")
    for weight in hooked:
        assert weight.grad is not None
        assert weight.grad_added_to_main_grad
    for product in products:
        if product.adapters is not None:
            product.adapters.end_step()
    assert tokens.grad is not None
    assert weights.grad is not None
    return [out.detach(), tokens.grad, weights.grad]


def one_by_one(
    case: Case, ups: list[Any], downs: list[Any], inputs: list[Tensor], taken: Tensor
) -> list[Tensor]:
    """The same in FP32 by autograd, whose gradients the matrices, and biases, get too."""
    tokens, weights = (x.float().clone().requires_grad_() for x in inputs[:2])
    out = torch.zeros_like(tokens)
    for expert, ((up, up_bias), (down, down_bias)) in enumerate(zip(ups, downs, strict=True)):
        rows = taken[:, expert].nonzero().flatten()
        activated = activation(tokens[rows] @ up.t() + up_bias, case.hidden_act)
        out = out.index_add(0, rows, (activated @ down.t() + down_bias) * weights[rows, expert][:, None])
    out.backward(inputs[2].float())
    assert tokens.grad is not None
    assert weights.grad is not None
    return [out.detach(), tokens.grad, weights.grad]


def activation(x: Tensor, hidden_act: str) -> Tensor:
    if hidden_act == "silu":
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    gate, up = x.chunk(2, -1)
    gate = gate.clamp(max=7.0)
    return gate * (1.702 * gate).sigmoid() * (up.clamp(-7.0, 7.0) + 1)


def leaves(case: Case, linear: list[Any], values: Tensor) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """Matrices and biases of a plain computation, the parameters of it that are trained, and those that are trained together."""
    matrices: list[Any] = []
    trained: list[Tensor] = []
    real: list[Tensor] = []
    for each, value in zip(linear, values, strict=True):
        bias: Any = 0.0
        if case.biased:
            bias = each.bias.detach().float().clone().requires_grad_()
            trained.append(bias)
            real.append(each.bias)
        if not case.adapted:
            matrices.append((value.float().clone().requires_grad_(), bias))
            trained.append(matrices[-1][0])
            real.append(each.weight)
            continue
        parts = []
        for adapter in each.adapters.values():
            a, b = (p.detach().float().clone().requires_grad_() for p in (adapter.a, adapter.b))
            trained += [a, b]
            real += [adapter.a, adapter.b]
            parts.append(SCALE * b @ a)
        matrices.append((value.float() + torch.cat(parts), bias))
    return matrices, trained, real


def check(case: Case) -> None:
    ups, up_values = linears(case, 2 * WIDTH, HIDDEN)
    downs, down_values = linears(case, HIDDEN, WIDTH)
    taken = case.routing()
    weights = (torch.rand(taken.shape, generator=case.generator).to(DEVICE) * taken).float()
    inputs = [case.random(case.tokens, HIDDEN), weights, case.random(case.tokens, HIDDEN)]
    up_matrices, up_plain, up_real = leaves(case, ups, up_values)
    down_matrices, down_plain, down_real = leaves(case, downs, down_values)
    plain, real = up_plain + down_plain, up_real + down_real
    is_trained = case.adapted or not case.quantized
    before = [p.main_grad.clone() for p in real] if is_trained else []
    found = together(case, ups, downs, inputs, taken)
    expected = one_by_one(case, up_matrices, down_matrices, inputs, taken)
    expected[2] = expected[2] * taken
    if is_trained:
        found += [p.main_grad - b for p, b in zip(real, before, strict=True)]
        expected += [torch.zeros_like(p) if p.grad is None else p.grad for p in plain]
    tolerance = 2e-2 if case.dtype != torch.float32 else 2e-6 if DEVICE.type == "cpu" else 1e-5
    for a, b in zip(found, expected, strict=True):
        # Relative to the largest: a sum of many terms may be near 0.
        error = float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        assert error < tolerance, (case, error)
    again = [p.main_grad.copy_(b) for p, b in zip(real, before, strict=True)] if is_trained else []
    repeated = together(case, ups, downs, inputs, taken)
    if is_trained:
        repeated += [g - b for g, b in zip(again, before, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, repeated, strict=True)), "other bits when repeated"


CASES = [
    Case(37, 6, 3),
    Case(37, 6, 3, apart=True),
    Case(29, 8, 2, load="few"),
    Case(29, 5, 1, load="one", hooked=True),
    Case(11, 1, 1),
    Case(37, 6, 3, biased=True, hidden_act="clamped_swiglu"),
    Case(37, 6, 3, adapted=True),
    Case(29, 6, 2, load="few", adapted=True, quantized=True),
    Case(29, 6, 2, quantized=True),
]

if __name__ == "__main__":
    if DEVICE.type == "cuda":
        torch.use_deterministic_algorithms(True)
        half = torch.bfloat16
        CASES += [
            Case(3000, 6, 3, load=load, dtype=half, adapted=a, biased=not a)
            for load in ("random", "few")
            for a in (False, True)
        ]
    for case in CASES:
        check(case)
    print("done", flush=True)
