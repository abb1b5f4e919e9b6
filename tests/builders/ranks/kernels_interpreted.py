"""Run by test_kernels.py under Triton's interpreter, and by tests/gpu on a GPU (`cuda` as its argument): each kernel
forward and backward against what sftd/trainer/model/ops.py computes on a CPU, and the lean optimizer's bit for bit."""

from __future__ import annotations

import atexit
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftd.trainer.data.token_keys import TokenKeys, token_keys
from sftd.trainer.model import cross_entropy_cpu, ops
from sftd.trainer.model.adapters.dropout import Dropout, threshold
from sftd.trainer.model.gradients import accumulate_grouped_weight_gradient
from sftd.trainer.model.grouped import rows as rows_of_experts
from sftd.trainer.model.grouped.activation import ACTIVATIONS, Activation, RowBias
from sftd.trainer.model.kernels import (
    cross_entropy,
    expert_bias,
    grouped_gradient,
    nf4,
    norm,
    rotary,
    routing,
    swiglu,
    weighted_swiglu,
)
from sftd.trainer.model.quantize.nf4 import Quantized, levels
from sftd.trainer.optimizer import lean_kernel, lean_update

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def results(function: Function, inputs: Sequence[Tensor], device: str) -> list[Tensor]:
    """Outputs, and the gradients of the inputs for fixed gradients of the outputs."""
    own = [x.to(device, copy=True).requires_grad_() for x in inputs]
    found = function(*own)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    generator = torch.Generator().manual_seed(9)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator).to(device) for o in outputs])
    return [*(o.detach().cpu() for o in outputs), *(x.grad.cpu() for x in own if x.grad is not None)]


def compare(kernel: Function, reference: Function, *inputs: Tensor) -> None:
    found, expected = results(kernel, inputs, DEVICE), results(reference, inputs, "cpu")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_norm() -> None:
    x, delta, weight = random(5, 2, 48), random(5, 3, 48)[:, :2], random(48)
    compare(lambda x, w: norm.RmsNorm.apply(x, w, 1e-5), lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight)
    compare(
        lambda x, d, w: norm.AddRmsNorm.apply(x, d, w, 1e-5),
        lambda x, d, w: ops.add_rms_norm(x, d, w, 1e-5),
        x,
        delta,
        weight,
    )
    compare(
        lambda x, w: norm.AddRmsNorm.apply(x * 1, None, w, 1e-5),
        lambda x, w: ops.add_rms_norm(x * 1, None, w, 1e-5),
        x,
        weight,
    )


def check_swiglu() -> None:
    for width in (40, 2050):
        compare(swiglu.SwiGlu.apply, ops.swiglu, random(3, 2, 2 * width))


def check_rotary() -> None:
    # Three groups of two queries and heads of 12: nothing is a power of two.
    angles = torch.stack((random(5, 6).cos(), random(5, 6).sin()))
    for batch in (1, 2):
        compare(
            lambda qkv: rotary.SplitRotary.apply(qkv, angles.to(DEVICE), 3, 12),
            lambda qkv: ops.split_rotary(qkv, angles, 3, 12),
            random(5, batch, 3 * 4 * 12),
        )
    # Gradients as attention hands them back: heads before tokens in memory.
    compare(
        lambda qkv: [
            x.permute(1, 2, 0, 3) * 1.5 for x in rotary.SplitRotary.apply(qkv, angles.to(DEVICE), 3, 12)
        ],
        lambda qkv: [x.permute(1, 2, 0, 3) * 1.5 for x in ops.split_rotary(qkv, angles, 3, 12)],
        random(5, 2, 3 * 4 * 12),
    )


def check_cross_entropy() -> None:
    for width, real in ((5000, 5000), (5000, 4990), (300, 0)):
        logits = random(4, width) * 3
        index = torch.tensor([3, -1, real - 1, 17] if real else [-1] * 4)
        found = tuple(x.cpu() for x in cross_entropy.sums(logits.to(DEVICE), index.to(DEVICE), real))
        expected = cross_entropy_cpu.sums(logits, index, real)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        log_total = found[0] + found[1].log()
        if real:
            entropy = torch.distributions.Categorical(logits=logits[:, :real]).entropy()
            torch.testing.assert_close(found[1].log() - found[3] / found[1], entropy)
        weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
        if not real:
            log_total = torch.zeros(4)
        mine, theirs = logits.to(DEVICE, copy=True), logits.clone()
        cross_entropy.gradient_(mine, *(x.to(DEVICE) for x in (index, log_total, weight)), real)
        mine = mine.cpu()
        cross_entropy_cpu.gradient_(theirs, index, log_total, weight, real)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        assert not mine[:, real:].any()


def check_dropout() -> None:
    from sftd.trainer.model.kernels import dropout as kernel

    keys = torch.from_numpy(token_keys(7, 3, 40))
    x = random(40, 1500) + 9.0
    ours = Dropout(0.3, product=2**31 - 5, first_column=96, part=(0, 1), tokens=TokenKeys())
    here = ours.apply(x, keys)
    there = kernel.dropped(
        x.to(DEVICE), keys.to(DEVICE), ours.product, ours.first_column, threshold(0.3), 1 / 0.7
    )
    assert 0.28 < float((here == 0).float().mean()) < 0.32
    torch.testing.assert_close(there.cpu(), here)
    assert torch.equal(there.cpu() == 0, here == 0)


def check_nf4() -> None:
    for rows in (4, 37):
        weight = random(rows, 192)
        weight[0, :64] = 0
        here = Quantized(weight.shape, torch.device("cpu"))
        here.fill(weight)
        there = Quantized(weight.shape, torch.device(DEVICE))
        there.fill(weight)
        assert torch.equal(there.codes.cpu(), here.codes)
        assert torch.equal(there.scales.cpu(), here.scales)
        # The interpreter truncates to BF16, a GPU rounds.
        for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
            found = nf4.dequantize(there.codes, there.scales, levels(there.codes.device), dtype)
            assert torch.equal(found.cpu(), here.dequantize(dtype))


def check_routing() -> None:
    # Two ranks of three experts; the fifth expert is taken by nobody.
    scores = random(13, 6)
    scores[:, 4] = -9.0
    taken = torch.zeros(13, 6, dtype=torch.bool).scatter_(1, scores.topk(3, 1).indices, True)
    slots, _ends = rows_of_experts.rows_of_tokens(taken, 3, 3)
    ordinals = taken.t().contiguous().cumsum(1, dtype=torch.int32)
    counts = [int(n) for n in ordinals[:, -1]]
    order = (2, 1, 0, 5, 4, 3)
    starts = torch.tensor([sum(counts[j] for j in order[: order.index(i)]) for i in range(6)])
    there = [x.to(DEVICE) for x in (taken, ordinals, starts.int())]
    assert torch.equal(routing.rows_of_tokens(there[0], there[1], there[2], 3).cpu(), slots)
    assert sorted(slots.flatten().tolist()) == list(range(39))
    x, rows, weights = random(13, 2050), random(39, 2050), random(13, 6)
    on, where = slots.to(DEVICE), there[0]
    assert torch.equal(routing.spread(x.to(DEVICE), on).cpu(), rows_of_experts.spread(x, slots))
    assert torch.equal(routing.collect(rows.to(DEVICE), on).cpu(), rows_of_experts.collect(rows, slots))
    moved = routing.weights_to_rows(weights.to(DEVICE), where, on)
    assert torch.equal(moved.cpu()[slots[3].long()], weights[3][taken[3]])
    assert torch.equal(routing.weights_from_rows(moved, where, on).cpu(), weights * taken)


def check_weighted_swiglu() -> None:
    """gpt-oss's clamps and biases too."""
    for width, experts, act in ((40, 0, "silu"), (1030, 0, "silu"), (1030, 3, "clamped_swiglu")):
        x, weight = random(7, 2 * width) * 6, random(7)
        bias = None
        if experts:
            bias = RowBias(random(experts, 2 * width), torch.tensor([0, 0, 2, 2, 2, 1, 0], dtype=torch.int32))
        there = None if bias is None else RowBias(*(each.to(DEVICE) for each in bias))
        kernel = partial(_weighted, bias=there, is_clamped=act == "clamped_swiglu")
        compare(kernel, partial(_on_cpu, bias=bias, function=ACTIVATIONS[act]), x, weight)


def _weighted(x: Tensor, weight: Tensor, bias: RowBias | None, is_clamped: bool) -> Any:
    return _Weighted.apply(x, weight, bias, is_clamped)


def _on_cpu(x: Tensor, weight: Tensor, bias: RowBias | None, function: Activation) -> Any:
    return _OnCpu.apply(x, weight, bias, function)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: RowBias | None, is_clamped: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.is_clamped = bias or (None, None), is_clamped
        ctx.y = weighted_swiglu.forward(x, weight, *ctx.bias, is_clamped=is_clamped)
        return ctx.y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = weighted_swiglu.backward(grads[0], *ctx.saved_tensors, *ctx.bias, is_clamped=ctx.is_clamped)
        assert torch.equal(found[0], ctx.y), "not what forward computed"
        return *found[1:], None, None


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: RowBias | None, function: Activation) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.function = bias, function
        return function.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.function.backward(grads[0], *ctx.saved_tensors, ctx.bias)[1:], None, None


def check_expert_bias() -> None:
    bias = RowBias(random(3, 2050), torch.tensor([2, 0, 0, 1, 2], dtype=torch.int32))
    y, weight, d_weight, dy = random(5, 2050), random(5), random(5), random(5, 2050) + 1
    mine = [each.to(DEVICE, copy=True) for each in (y, d_weight)]
    there = [each.to(DEVICE) for each in bias]
    expert_bias.add_(mine[0], weight.to(DEVICE), *there)
    expert_bias.add_weight_gradient_(dy.to(DEVICE), mine[1], *there)
    bias.add_to(y, weight)
    bias.add_weight_gradient_to(d_weight, dy)
    for a, b in zip(mine, (y, d_weight), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)


def check_grouped_gradient() -> None:
    # The second and the last matrix have no rows; numbers of rows and sizes are multiples of nothing.
    ends, places = torch.tensor([3, 3, 71, 71], dtype=torch.int32), ((4, 70, 150), (11000, 150, 1))
    x, dy, before = random(71, 150), random(71, 70), random(45000)
    mine, theirs = before.to(DEVICE, copy=True), before.clone()
    grouped_gradient.accumulate(x.to(DEVICE), dy.to(DEVICE), ends.to(DEVICE), mine.as_strided(*places, 9))
    accumulate_grouped_weight_gradient(x, dy, ends, theirs.as_strided(*places, 9))
    torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-5)


def check_lean() -> None:
    group = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    # Rows of several blocks, and numbers of rows, columns and keys beyond 31 bits.
    for name, *corner in (
        ("a", 0, 0, 5, 48),
        ("b", 70_000, 12, 3, 2500),
        ("c", 3, 0, 1, 576),
        ("d", 2**31 + 5, 2**31 + 1, 2, 3),
    ):
        place = lean_update.Rectangle(name, *corner)
        n = place.rows * place.columns
        whole = [random(n) * 0.02, random(n + 1)[1:] * 1e-3, random(n + 2)[2:].square() * 1e-6]
        gradient, factor = random(n + 3)[3:] * 1e-3, torch.tensor(0.37)
        # A first update of padding, and what is no number.
        gradient[0] = whole[0][0] = whole[1][0] = whole[2][0] = 0.0
        if n > 99:
            gradient[1:4] = torch.tensor([math.nan, math.inf, 1e30])
            whole[0][5] = 3.38e38
        mine = [x.bfloat16().to(DEVICE) for x in whole]
        theirs = [x.bfloat16() for x in whole]
        for number in (1, 2, 900):
            values, keys = lean_update.coefficients(group, number), lean_update.keys(7, number, name)
            own = gradient.to(DEVICE), factor.to(DEVICE)
            lean_kernel.update(mine[0], mine[1], mine[2], *own, place, keys, values)
            bits = [x.view(torch.uint16).numpy() for x in theirs]
            lean_update.update(
                bits[0], bits[1], bits[2], gradient.numpy(), float(factor), place, keys, values
            )
            for a, b in zip(mine, theirs, strict=True):
                # A NaN has many representations.
                assert torch.equal(a.cpu().nan_to_num(9.0), b.nan_to_num(9.0)), (place, number)
        assert n < 99 or theirs[0].isnan().sum() >= 2
        assert not any(x[0] for x in theirs)


def recorded(path: str) -> None:
    """Write the launches to a file: of each kind of arguments the first."""
    from triton.runtime.interpreter import InterpretedFunction

    launches: dict[str, dict[str, Any]] = {}
    run = InterpretedFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        values = dict(zip(parameters, args, strict=False)) | given
        fixed = {name: values.pop(name) for name, p in parameters.items() if "constexpr" in str(p.annotation)}
        kinds = {name: _kind(values.pop(name)) for name in parameters if name in values}
        switches = [value for value in fixed.values() if isinstance(value, bool)]
        launch = {
            "module": self.fn.__module__,
            "name": self.fn.__name__,
            "kinds": kinds,
            "fixed": fixed,
            "options": values,
        }
        launches.setdefault(str((self.fn.__name__, kinds, switches)), launch)
        run(self, *args, grid=grid, warmup=warmup, **given)

    InterpretedFunction.run = record
    atexit.register(lambda: Path(path).write_text(json.dumps(list(launches.values()))))


def _kind(value: Any) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, Tensor):
        short = {"bfloat16": "bf16", "float32": "fp32", "bool": "i1"}
        name = str(value.dtype).removeprefix("torch.")
        return "*" + short.get(name, name.replace("uint", "u").replace("int", "i"))
    if isinstance(value, float):
        return "fp32"
    return "i1" if isinstance(value, bool) else "i32" if abs(value) < 2**31 else "i64"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        recorded(sys.argv[2])
    for name, check in (
        ("norm", check_norm),
        ("swiglu", check_swiglu),
        ("rotary", check_rotary),
        ("cross_entropy", check_cross_entropy),
        ("dropout", check_dropout),
        ("nf4", check_nf4),
        ("routing", check_routing),
        ("weighted_swiglu", check_weighted_swiglu),
        ("expert_bias", check_expert_bias),
        ("grouped_gradient", check_grouped_gradient),
        ("lean", check_lean),
    ):
        check()
        print(name, flush=True)
