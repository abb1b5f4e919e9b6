"""The known, harmless noise of the libraries."""

from __future__ import annotations

import logging
import warnings

# (message, category, module) of warnings that third-party code raises on every start and that users cannot act on.
_KNOWN_WARNINGS: list[tuple[str, type[Warning], str]] = [
    # On import, without the optional packages that sftd does without.
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning, r"megatron\.core\."),
    (r"absl\.logging is not installed", UserWarning, r"megatron\.core\."),
    # About Megatron's own defaults and modules, none of which are chosen here.
    (r"full scope is deprecated", UserWarning, r"megatron\.core\."),
    (r"MimoModelConfig is experimental", UserWarning, r"megatron\.core\."),
    (r"The following imports from `dynamic_context\.py`", DeprecationWarning, r"megatron\.core\."),
    (r"MLP requires ffn_hidden_size", DeprecationWarning, r"megatron\.core\."),
    (r"Warning: tp_group is None, using default tp group", DeprecationWarning, r"megatron\.core\."),
    # The device is set, only not named (see session.py).
    (r"barrier\(\): using the device under current context", UserWarning, r"torch\.distributed\."),
    # Whole experts (see experts.py) beside layers that are split.
    (
        r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
        UserWarning,
        r"megatron\.core\.",
    ),
    # Megatron reads a checkpoint's plain values on each rank by itself.
    (
        r"torch\.distributed is disabled, unavailable or uninitialized",
        UserWarning,
        r"torch\.distributed\.checkpoint",
    ),
    (r"The argument order of load has been changed", UserWarning, r"torch\.distributed\.checkpoint"),
    # Both from inside Megatron's checkpoint code, attributed to the caller in between (such as no_accelerator.py).
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning, r""),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning, r""),
]


def quiet_third_parties() -> None:
    """Silence the known, harmless noise of the libraries; everything else stays audible."""
    for message, category, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    # Deprecation notices of GPTModel and of the checkpoint writer (model.py and checkpoint.py say why they are used
    # all the same), and a note on every start that DDP lays out its own buffers.
    for name in (
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron.core.distributed.distributed_data_parallel",
        # "No CUDA runtime is found", where a CUDA toolkit is installed and a process works on the CPU.
        "torch.utils.cpp_extension",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
