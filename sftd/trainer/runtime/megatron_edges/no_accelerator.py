"""Redirects torch's and Megatron's CUDA calls to the CPU, for the whole process.

Megatron-core hard-codes CUDA in about 32 places (buffers, pipeline messages, gradient norms). Loaded only on the CPU,
never on a GPU. Every test that trains tests this against the pinned Megatron.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.jit import disable_jit_fuser
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

_TYPE_NAMES = ("Float", "Half", "BFloat16", "Int", "Long", "Byte", "Double", "Bool")
_CUDA_TO_CPU = {f"torch.cuda.{name}Tensor": f"torch.{name}Tensor" for name in _TYPE_NAMES}
_CPU_TO_CUDA = {cpu: cuda for cuda, cpu in _CUDA_TO_CPU.items()}


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CpuInsteadOfCuda(TorchFunctionMode):
    """Redirects device arguments, `.cuda()`, pinned memory and CUDA type names to their CPU equivalents."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type:
            return self._type(func, args, kwargs or {})
        if kwargs:
            kwargs = dict(kwargs)
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func is torch.Tensor.to and any(_is_cuda(a) for a in args[1:]):
            args = (args[0], *("cpu" if _is_cuda(a) else a for a in args[1:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _type(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if len(args) == 1 and not kwargs:
            # Megatron tests type() == 'torch.cuda.FloatTensor'.
            name = func(*args)
            return _CPU_TO_CUDA.get(name, name)
        wanted = args[1] if len(args) > 1 else kwargs.get("dtype")
        return func(args[0], _CUDA_TO_CPU.get(wanted, wanted) if isinstance(wanted, str) else wanted)


class _NoStream:
    """Replaces a CUDA stream. On the CPU all work is already done."""

    def wait_stream(self, *_: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: object) -> _NoStream:
        return self


class _NoStreams:
    """Replaces `torch.cuda.current_stream`, and marks the process as redirected."""

    def __call__(self, *_: object) -> _NoStream:
        return _NoStream()


def _redirect_cuda() -> None:
    """Enter the mode for the rest of the process and replace the `torch.cuda` calls that it does not see. Idempotent."""
    stream: object = torch.cuda.current_stream
    if isinstance(stream, _NoStreams):
        return
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "current_stream": _NoStreams(),
        "stream": lambda _: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    CpuInsteadOfCuda().__enter__()


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's named random streams on the CPU generator (random.py:303 creates CUDA states)."""

    def add(self, name: str, seed: int) -> None:
        """Start the stream `name` from `seed`. Raises `ValueError` when either is already in use."""
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random stream {name!r} or seed {seed} already exists")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the stream `name` inside the block."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def install() -> None:
    """Redirect CUDA calls, put random streams on the CPU generator (random.py), disable torch.compile of tiny fusions
    (jit.py; 15 s, no gain), and fix the experts' all-to-all dispatcher: token_dispatcher.py:469 would create a CUDA
    stream, and moe_utils.py:1184 converts the all-to-all's sizes to numbers only when they come from a GPU.
    """
    _redirect_cuda()
    megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    disable_jit_fuser()
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.cuda.current_stream()
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
