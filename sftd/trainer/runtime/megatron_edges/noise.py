"""Known, harmless warnings of the libraries."""

from __future__ import annotations

import logging
import warnings

# (message, category, module) of warnings on every start that users cannot act on.
_KNOWN_WARNINGS: list[tuple[str, type[Warning], str]] = [
    # On import, about optional packages that sftd does not use.
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning, r"megatron\.core\."),
    (r"absl\.logging is not installed", UserWarning, r"megatron\.core\."),
    # About Megatron's own defaults and modules, which sftd does not choose.
    (r"full scope is deprecated", UserWarning, r"megatron\.core\."),
    (r"MimoModelConfig is experimental", UserWarning, r"megatron\.core\."),
    (r"The following imports from `dynamic_context\.py`", DeprecationWarning, r"megatron\.core\."),
    (r"MLP requires ffn_hidden_size", DeprecationWarning, r"megatron\.core\."),
    (r"Warning: tp_group is None, using default tp group", DeprecationWarning, r"megatron\.core\."),
    # The device is set, but not passed as `device_id` (see session.py).
    (r"barrier\(\): using the device under current context", UserWarning, r"torch\.distributed\."),
    # Unsplit experts (see experts.py) beside split layers.
    (
        r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
        UserWarning,
        r"megatron\.core\.",
    ),
    # Each rank reads a checkpoint's plain values independently.
    (
        r"torch\.distributed is disabled, unavailable or uninitialized",
        UserWarning,
        r"torch\.distributed\.checkpoint",
    ),
    (r"The argument order of load has been changed", UserWarning, r"torch\.distributed\.checkpoint"),
    # Both come from Megatron's checkpoint code, but are attributed to a caller such as no_accelerator.py.
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning, r""),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning, r""),
]


def quiet_third_parties() -> None:
    """Silence the known, harmless warnings of the libraries, and no others."""
    for message, category, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    # Deprecations of GPTModel (see model.py) and of the checkpoint writer, and DDP's note about its buffers on every start.
    for name in (
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron.core.distributed.distributed_data_parallel",
        # "No CUDA runtime is found", on a CPU run with an installed CUDA toolkit.
        "torch.utils.cpp_extension",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
