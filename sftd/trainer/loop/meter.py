"""Device use of a step: MFU and peak memory."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sftd.domain.model.flops import peak_flops, training_flops
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.model_section import Model

if TYPE_CHECKING:
    from sftd.trainer.runtime.session import Session


class Meter:
    """MFU of all ranks, and this rank's peak memory."""

    def __init__(self, shape: ModelShape, model: Model, session: Session) -> None:
        self._shape, self._model = shape, model
        self._device = session.device
        name = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"
        one = peak_flops(name, session.dtype)
        self._peak = None if one is None else one * dist.get_world_size()

    def mfu(self, tokens: int, squared_lengths: float, seconds: float) -> float | None:
        """Model FLOPs of `tokens` real tokens, in samples with Σ n² = `squared_lengths`, divided by the devices' peak
        FLOPs in `seconds`. None if the peak is unknown."""
        if self._peak is None or seconds <= 0:
            return None
        return training_flops(self._shape, tokens, squared_lengths, self._model) / (seconds * self._peak)

    def peak_memory(self) -> int:
        """Peak bytes so far: of tensors on a GPU, of the whole process on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
