"""`optimizer.precision: lean`: AdamW without FP32 copies of the weights, and with BF16 moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sftd.trainer.optimizer import lean_update
from sftd.trainer.optimizer.lean_update import Rectangle


class LeanAdamW(torch.optim.AdamW):
    """AdamW of BF16 weights and BF16 moments, both rounded stochastically. Gradients are FP32, in `decoupled_grad` of the
    weights, where Megatron's precision-aware optimizer has them.

    Its state has the names of torch's AdamW, and needs to be allocated before the first step.
    """

    # What the gradients of the next step are multiplied by: FP32 scalar on the device.
    factor: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        places: Mapping[Tensor, Sequence[tuple[int, Rectangle]]],
        seed: int,
    ) -> None:
        """`places` has for each weight of `groups` the rectangles that it consists of, with the index of the first element of
        each. `seed` is that of the random bits."""
        super().__init__(groups)
        self._places, self._seed = places, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update weights and moments in place."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] += 1
                self._update(weight, state, group)
        self.factor = None

    def _update(self, weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        number = int(state["step"])
        values = lean_update.coefficients(group, number)
        factor = torch.ones((), device=weight.device) if self.factor is None else self.factor
        tensors = weight, state["exp_avg"], state["exp_avg_sq"], weight.decoupled_grad  # type: ignore[attr-defined]
        for taken, place in self._places[weight]:
            keys = lean_update.keys(self._seed, number, place.name)
            own, first, second, gradient = (x[taken : taken + place.rows * place.columns] for x in tensors)
            if weight.is_cuda:
                from sftd.trainer.optimizer import lean_kernel

                lean_kernel.update(own, first, second, gradient, factor, place, keys, values)
            else:
                w, m, v = (x.view(torch.uint16).numpy() for x in (own, first, second))
                lean_update.update(w, m, v, gradient.numpy(), float(factor), place, keys, values)
