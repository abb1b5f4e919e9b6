"""Asynchronous upload of small host arrays to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor of the same dtype and shape on `device`."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    # A copy from unpinned memory would wait for all queued work of the device.
    return tensor.pin_memory().to(device, non_blocking=True)
