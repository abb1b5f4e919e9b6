"""The process group, the parallel layout, the device and the seeds of this rank."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

import sftd
from sftd.domain.plan.sizes import weights_dtype
from sftd.domain.spec.spec import Spec
from sftd.trainer.errors import UserError
from sftd.trainer.runtime import rendezvous
from sftd.trainer.runtime.megatron_edges.training import be_deterministic
from sftd.trainer.runtime.process import device_kind

# Variables that change the choice of kernels or the order of sums.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_NVLS_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)


@dataclass(frozen=True)
class Layout:
    """The sizes of the parallel dimensions and this rank's 0-based rank in each. The `ep` ranks that share the experts of a
    layer may be any ranks of its pipeline stage (see `experts`).
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    ep: int = 1
    ep_rank: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes only, as in events and manifests."""
        return {name: getattr(self, name) for name in ("tp", "pp", "vpp", "cp", "ep", "dp")}

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp - 1

    @property
    def counts(self) -> bool:
        """Whether this rank's loss and token counts enter the sums: one rank per share of the tokens (DP × CP)."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def reports(self) -> bool:
        """Whether this rank writes the journal: rank 0 of the last pipeline stage."""
        return self.counts and self.cp_rank == 0 and self.dp_rank == 0


@dataclass(frozen=True)
class Session:
    """This rank's device and place in the layout. `dtype`: of the weights in forward and backward."""

    device: torch.device
    dtype: torch.dtype
    layout: Layout


def start(spec: Spec, port_file: Path | None = None) -> Session:
    """Join the process group and seed this rank. `port_file`: see `rendezvous.store`. Raises `UserError` when the device is
    missing."""
    device = _device(spec)
    store = rendezvous.store(port_file)
    world: dict[str, Any] = {}
    if store is not None:
        # With a store, torch does not read these from the environment.
        world = {
            "store": store,
            "rank": int(os.environ["RANK"]),
            "world_size": int(os.environ["WORLD_SIZE"]),
        }
    # Before Megatron creates its first tensor.
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With `device_id`, NCCL creates the communicators of Megatron's twenty groups eagerly, 0.38 GiB each. A single
        # rank needs none.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        dist.init_process_group("nccl", device_id=device if several else None, **world)
    else:
        from sftd.trainer.runtime.megatron_edges import no_accelerator

        no_accelerator.install()
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        dist.init_process_group("gloo", **world)
    chosen = spec.training.deterministic
    be_deterministic(device.type == "cpu" if chosen is None else chosen)
    megatron = spec.model.megatron
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=_chunks(spec) if _chunks(spec) > 1 else None,
        context_parallel_size=megatron.context_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=spec.model.megatron.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    layout = Layout(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp=_chunks(spec),
        cp=parallel_state.get_context_parallel_world_size(),
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
    )
    # As in Megatron-LM, each stage has its own random streams, and data-parallel copies share them.
    seed = megatron.seed + 100 * layout.pp_rank
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Session(device, getattr(torch, weights_dtype(spec, device.type)), layout)


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank. Called by every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def close() -> None:
    """Leave the process group once every rank has called this."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _chunks(spec: Spec) -> int:
    return spec.model.megatron.virtual_pipeline_model_parallel_size or 1


def _device(spec: Spec) -> torch.device:
    if device_kind(spec) == "cpu":
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise UserError(
            f"launch.device is cuda, but this host has {torch.cuda.device_count()} GPUs and rank {index} needs its own"
        )
    return torch.device("cuda", index)


def environment(session: Session) -> dict[str, Any]:
    """The environment that determines a run's numbers together with its spec: versions, device, threads, layout."""
    is_cuda = session.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        # Not megatron.core.__version__: it appends the commit of the repository in the working directory.
        "megatron_core": _installed_version("megatron-core"),
        "transformers": _installed_version("transformers"),
        "sftd": sftd.__version__,
        "device": torch.cuda.get_device_name(session.device) if is_cuda else "cpu",
        "cuda": torch.version.cuda if is_cuda else None,
        "driver": _driver_version() if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,
        "triton": _installed_version("triton") if is_cuda else None,
        # Computes the deterministic attention's backward, where installed.
        **({"cudnn_frontend": _installed_version("nvidia-cudnn-frontend")} if is_cuda else {}),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_model": _cpu_model(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "layout": session.layout.sizes,
        "dtype": str(session.dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _installed_version(package: str) -> str | None:
    # Reads the metadata, because importing transformers takes seconds.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit()), None)


def _cpu_model() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
