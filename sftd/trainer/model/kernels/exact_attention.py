"""Causal attention for `training.deterministic` on Hopper: bit-identical when repeated, at cuDNN's speed.

In deterministic mode PyTorch avoids cuDNN and uses FlashAttention 2. cuDNN's forward is deterministic. Of its two
backwards, PyTorch can call only the one that sums the queries' gradient in arbitrary order. NVIDIA's cudnn-frontend (the
`gpu` extra) offers the deterministic one, which holds the gradients of all scores in memory, so batch and heads are
processed in parts. Without the front end or its kernel, FlashAttention's backward runs on cuDNN's output and statistics.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sftd.domain.plan.sizes import SCORES_BYTES

# cuDNN rounds the lengths of the score gradients up to a multiple of this.
_TILE = 64
# Caches by `_key`: whether PyTorch's cuDNN attention supports the tensors; cuDNN's compiled backward, or None if there is
# none.
_taken: dict[tuple[Any, ...], bool] = {}
_backwards: dict[tuple[Any, ...], _Backward | None] = {}


def takes(query: Tensor, key: Tensor, value: Tensor, is_grouped: bool) -> bool:
    """Whether `attend` supports q [b, heads, s, d], k and v [b, groups, s, d]: half precision, a Hopper GPU, deterministic
    mode, and supported by cuDNN."""
    return (
        query.is_cuda
        and query.dtype != torch.float32
        and torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and _cudnn_takes(query, key, value, is_grouped)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ · scale)V, causal: [b, heads, s, d]."""
    return cast(Tensor, _Attention.apply(query, key, value, scale))


def frontend() -> Any:
    """The cudnn-frontend module, or None if it is not installed."""
    try:
        return importlib.import_module("cudnn")
    except ImportError:
        return None


def parts(batch: int, groups: int, score_bytes: int, most: int) -> list[tuple[slice, slice]] | None:
    """(rows, groups) of each part, of about equal size. A group of one row takes `score_bytes`, a part at most `most`;
    None if a single group exceeds `most`."""
    if score_bytes > most:
        return None
    rows = min(batch, max(1, most // (score_bytes * groups)))
    together = min(groups, most // score_bytes)
    return [(row, group) for row in _even(batch, rows) for group in _even(groups, together)]


def _even(total: int, most: int) -> list[slice]:
    each = -(-total // -(-total // most))
    return [slice(start, min(start + each, total)) for start in range(0, total, each)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
        # Neither kernel draws random numbers; FlashAttention's backward still needs these arguments.
        ctx.rest, ctx.scale = found[2:8], scale
        ctx.save_for_backward(query, key, value, found[0], found[1])
        return cast(Tensor, found[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, statistics = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        statistics = statistics.view(*query.shape[:3], 1)
        found = _by_cudnn((query, key, value, out, grad, statistics), ctx.scale)
        if found is None:
            found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad, query, key, value, out, statistics.squeeze(-1), *ctx.rest[:4], 0.0, True, *ctx.rest[4:],
                scale=ctx.scale,
            )  # fmt: skip
        return found[0], found[1], found[2], None


def _by_cudnn(inputs: tuple[Tensor, ...], scale: float) -> tuple[Tensor, ...] | None:
    """Gradients of query, key and value; None if cuDNN cannot compute them. `inputs`: see `_Backward`."""
    cudnn = _usable_frontend()
    if cudnn is None:
        return None
    batch, heads, length, _ = inputs[0].shape
    groups = inputs[1].shape[1]
    padded = -(-length // _TILE) * _TILE
    cut = parts(batch, groups, heads // groups * padded * padded * inputs[0].element_size(), SCORES_BYTES)
    outputs = tuple(torch.empty_like(x) for x in inputs[:3])
    for rows, some in cut or ():
        its = slice(some.start * (heads // groups), some.stop * (heads // groups))
        own = (its, some, some, its, its, its)
        tensors = [x[rows, share] for x, share in zip((*inputs, *outputs), (*own, *own[:3]), strict=True)]
        backward = _backward_of(cudnn, tensors, scale)
        if backward is None:
            return None
        backward.run(tensors)
    return outputs if cut else None


def _backward_of(cudnn: Any, tensors: list[Tensor], scale: float) -> _Backward | None:
    key = _key(tensors, scale)
    if key not in _backwards:
        try:
            _backwards[key] = _Backward(cudnn, tensors, scale)
        except cudnn.cudnnGraphNotSupportedError:
            _backwards[key] = None
    return _backwards[key]


class _Backward:
    """A compiled cuDNN graph for tensors of one shape: query, key, value, output, its gradient, statistics
    FP32 [b, heads, s, 1], then the gradients of query, key and value."""

    def __init__(self, cudnn: Any, tensors: list[Tensor], scale: float) -> None:
        self._cudnn, self._handle = cudnn, _handle(tensors[0].device.index)
        half = cudnn.data_type.BFLOAT16 if tensors[0].dtype == torch.bfloat16 else cudnn.data_type.HALF
        full = cudnn.data_type.FLOAT
        self._graph = cudnn.pygraph(
            io_data_type=half, intermediate_data_type=full, compute_data_type=full, handle=self._handle
        )
        inputs = [
            self._graph.tensor(
                name=f"input{n}",
                dim=list(x.shape),
                stride=list(x.stride()),
                data_type=full if x.dtype == torch.float32 else half,
            )
            for n, x in enumerate(tensors[:6])
        ]
        named = dict(zip(("q", "k", "v", "o", "dO", "stats"), inputs, strict=True))
        outputs = self._graph.sdpa_backward(
            **named, attn_scale=scale, use_causal_mask=True, use_deterministic_algorithm=True
        )
        for output, x in zip(outputs, tensors[6:], strict=True):
            output.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
        self._places = [*inputs, *outputs]
        self._graph.validate()
        self._graph.build_operation_graph()
        self._graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self._graph.check_support()
        self._graph.build_plans()
        self._bytes = max(1, self._graph.get_workspace_size())

    def run(self, tensors: list[Tensor]) -> None:
        """Queue the graph on the current stream."""
        device = tensors[0].device
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(device).cuda_stream)
        # From the caching allocator, so that other operations can reuse the memory.
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        self._graph.execute(dict(zip(self._places, tensors, strict=True)), workspace, handle=self._handle)


@cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return frontend().create_handle()


@cache
def _usable_frontend() -> Any:
    """The front end, or None if it uses another version of cuDNN than PyTorch."""
    found = frontend()
    return found if found is not None and found.backend_version() == torch.backends.cudnn.version() else None


def _cudnn_takes(query: Tensor, key: Tensor, value: Tensor, is_grouped: bool) -> bool:
    from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

    known = _key([query, key, value], query.requires_grad)
    if known not in _taken:
        # In deterministic mode PyTorch returns False because of its own backward.
        torch.use_deterministic_algorithms(False)
        try:
            params = SDPAParams(query, key, value, None, 0.0, True, is_grouped)
            _taken[known] = can_use_cudnn_attention(params)
        finally:
            torch.use_deterministic_algorithms(True)
    return _taken[known]


def _key(tensors: list[Tensor], *rest: object) -> tuple[Any, ...]:
    return (tensors[0].device, tensors[0].dtype, *((x.shape, x.stride()) for x in tensors), *rest)
