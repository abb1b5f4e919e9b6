"""Setup of a rank's process before torch starts: tie to torchrun, signals, warnings, environment."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from sftd.domain.plan.sizes import CUBLAS_CONFIG
from sftd.domain.spec.spec import Spec
from sftd.trainer.errors import UserError
from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties
from sftd.wire.attempt.directory import make_private

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 5.0

# Signals that end training. No threading.Event: its lock is not reentrant, and a second signal may arrive within the handler.
_stop_signals: list[int] = []
# torchrun sets these for each rank.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def prepare() -> None:
    """Prepare this process: die with torchrun, stop cleanly on SIGTERM, silence known warnings, set CUDA's defaults."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    stop_on(signal.SIGTERM)
    quiet_third_parties()
    set_cuda_defaults()


def set_cuda_defaults() -> None:
    """Set the variables that are read once, when CUDA starts."""
    # Deterministic mode requires the first. The second lets Megatron overlap tensor-parallel communication with
    # computation.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_CONFIG)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Packed micro-batches vary in size, which fragments ordinary memory segments.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def use_single_process_defaults() -> None:
    """Make this process the only rank of its world, unless torchrun started it.

    Raises `UserError` when only some of torchrun's variables are set: an earlier job left them in the shell, or other
    ranks are meant to exist.
    """
    found = [name for name in _LAUNCHED if name in os.environ]
    if found and len(found) < len(_LAUNCHED):
        missing = ", ".join(name for name in _LAUNCHED if name not in found)
        raise UserError(
            f"{', '.join(found)} set in the environment without {missing}: this looks like one rank of several, but "
            f"their meeting point is not set. fix: `unset {' '.join(found)}` to train in one process, or start the ranks "
            "with torchrun"
        )
    if not found:
        # Port 0 selects a free port.
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def device_kind(spec: Spec) -> str:
    """`cpu` or `cuda`: the spec's device; for `auto` the daemon's, or else a GPU if this host has one."""
    if spec.launch.device != "auto":
        return spec.launch.device
    import torch

    return os.environ.get("SFTD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def die_with_parent() -> None:
    """Have the kernel kill this process when torchrun dies (Linux only).

    Ends the process if torchrun is already dead.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and not _is_torchrun(1):
        os._exit(1)


def _is_torchrun(pid: int) -> bool:
    # Orphans belong to pid 1, but in a container torchrun itself may be pid 1.
    try:
        return b"torch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def stop_on(number: signal.Signals) -> None:
    """Make a signal end training at the next step boundary, after a checkpoint."""
    signal.signal(number, _on_stop_signal)


def _on_stop_signal(number: int, _frame: FrameType | None) -> None:
    _stop_signals.append(number)


def stop_signalled() -> bool:
    """Whether this process received a signal that ends training."""
    return bool(_stop_signals)


def leave_stack_on_request(path: Path) -> None:
    """Make SIGUSR1 write the stacks of all threads to `path`, even while this process is blocked."""
    make_private(path.parent)
    # Never closed: the handler runs in C and needs the descriptor until the process ends.
    file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def watch_for_stack_requests(wanted: Path) -> None:
    """Write the stacks once the file `wanted` exists: signals of the daemon do not reach a rank on another machine."""

    def watch() -> None:
        while not wanted.exists():
            time.sleep(_POLL_SECONDS)
        # Signal the main thread, so that it is the current thread in the dump.
        signal.pthread_kill(main.ident or 0, signal.SIGUSR1)

    main = threading.main_thread()
    threading.Thread(target=watch, name="stack requests", daemon=True).start()
