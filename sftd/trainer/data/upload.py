"""Small host arrays onto the device, without the host or the device waiting for the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor of its dtype and shape on `device`."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    # From pinned memory: any other copy waits until the device has done all that it was given before.
    return tensor.pin_memory().to(device, non_blocking=True)
