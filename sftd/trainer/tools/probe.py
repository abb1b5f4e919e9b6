"""`python -m sftd.trainer.tools.probe`: prints versions of torch and Megatron-core and the devices as one line of JSON.
`sftd doctor` runs it, because the control plane imports neither."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any


def probe() -> dict[str, Any]:
    """Versions, devices, and the result of a test reduction by NCCL."""
    from importlib.metadata import version

    from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties

    quiet_third_parties()
    import megatron.core.parallel_state  # noqa: F401  tests the import
    import torch

    found: dict[str, Any] = {
        "torch": str(torch.__version__),
        "megatron_core": version("megatron-core"),
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "nccl": None,
        "nccl_error": None,
    }
    if found["gpus"]:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["nccl_error"] = _try_nccl(found["gpus"])
    return found


def _try_nccl(gpus: int) -> str | None:
    """Why NCCL cannot reduce over all GPUs of this host; None when it can."""
    import torch
    from torch import distributed as dist

    try:
        torch.cuda.nccl.all_reduce([torch.ones(8, device=f"cuda:{i}") for i in range(gpus)])
        torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(
                "nccl",
                init_method=f"file://{os.path.join(folder, 'store')}",
                rank=0,
                world_size=1,
                device_id=torch.device("cuda:0"),
            )
            dist.all_reduce(torch.ones(8, device="cuda:0"))
            torch.cuda.synchronize()
            dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None


if __name__ == "__main__":
    # Descriptor 1 becomes a copy of stderr, so that output of libraries does not mix with the JSON.
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(probe(), line)
    line.close()
    sys.exit(0)
