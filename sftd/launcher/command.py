"""The command and the environment of an attempt. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from sftd import settings
from sftd.domain.spec.spec import Spec
from sftd.wire.attempt.directory import AttemptDir

# Marks every process of an attempt, so that survivors are found after the leader is gone.
TOKEN_VARIABLE = "SFTD_ATTEMPT_TOKEN"  # noqa: S105  a name, not a token
# The trainer uses neither the database nor a mirror, and their URLs may hold passwords.
_WITHHELD = (*settings.WITHHELD, "PGPASSWORD")
# A daemon that adopted torchrun is not its parent and cannot wait for it, so a shell writes the exit code to a file.
_WRITE_CODE = 'echo "$code" > "$0.partial" && mv "$0.partial" "$0"; exit "$code"'
_SHELL = f'"$@"; code=$?; {_WRITE_CODE}'
# Standard input is a pipe whose other end only the owner has: it closes when the owner ends, SIGKILL included. The ranks end
# with torchrun.
_TIED_SHELL = (
    'exec 3<&0 </dev/null; "$@" 3<&- & run=$!; { read -r _ <&3; kill -9 "$run"; } & watch=$!; '
    f'wait "$run"; code=$?; kill "$watch"; {_WRITE_CODE}'
)


def torchrun_argv(spec: Spec, directory: AttemptDir) -> list[str]:
    """The torchrun command of an attempt on one machine. sftd restarts attempts itself, hence `--max-restarts 0`."""
    return [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        # Like --standalone, but with a file instead of a port that is open to the network.
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        f"--rdzv-endpoint={directory.rendezvous_file}",
        f"--rdzv-id={directory.path.parent.name}",
        "--local-addr=127.0.0.1",
        "--nnodes=1",
        f"--nproc-per-node={spec.nproc_per_node}",
        "--max-restarts=0",
        f"--log-dir={directory.ranks_dir}",
        # Each rank writes to files of its own: nothing is lost with torchrun, and every line has its rank.
        "--redirects=3",
        "-m",
        "sftd.trainer",
        str(directory.path),
    ]


def torchrun_argv_of_node(spec: Spec, directory: AttemptDir) -> list[str]:
    """The torchrun command of each of several machines. The job's script sets the rendezvous in torchrun's variables (PET_…):
    the first machine is known only there."""
    return [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=c10d",
        f"--rdzv-id={directory.path.parent.name}-{directory.path.name}",
        f"--nnodes={spec.launch.nnodes}",
        f"--nproc-per-node={spec.nproc_per_node}",
        "--max-restarts=0",
        f"--log-dir={directory.ranks_dir}",
        # Each rank writes to files of its own: nothing is lost with torchrun, and every line has its rank.
        "--redirects=3",
        "-m",
        "sftd.trainer",
        str(directory.path),
    ]


def wrapped_argv(argv: list[str], directory: AttemptDir, *, tied: bool = False) -> list[str]:
    """`argv` under a shell that writes its exit code to the attempt's exit file. With `tied`, the shell kills it when standard
    input closes."""
    return ["/bin/sh", "-c", _TIED_SHELL if tied else _SHELL, str(directory.exit_file), *argv]


def without_secrets(base: Mapping[str, str]) -> dict[str, str]:
    """`base` without the variables that may hold secrets."""
    return {name: value for name, value in base.items() if not name.startswith(_WITHHELD)}


def rank_variables(*, token: str, device: str) -> dict[str, str]:
    """Variables of every rank, for all launchers."""
    return {
        TOKEN_VARIABLE: token,
        "SFTD_DEVICE": device,
        # Ranks must not import modules from their working folder.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# torchrun opens no port for the ranks of one host: they have their own rendezvous (sftd/trainer/runtime/rendezvous.py).
ONE_HOST = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# They communicate over shared memory and NVLink; NCCL and gloo need an interface only for their bootstrap.
ONE_HOST_DEFAULTS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def environment(
    base: Mapping[str, str], *, token: str, device: str, threads: int, devices: list[str]
) -> dict[str, str]:
    """Environment of an attempt on this host: `base` without secrets, plus the attempt's variables."""
    env = ONE_HOST_DEFAULTS | without_secrets(base) | rank_variables(token=token, device=device) | ONE_HOST
    env["OMP_NUM_THREADS"] = str(threads)
    # Devices have NVML's numbers, which are in this order. CUDA's default order is fastest first.
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(d.removeprefix("cuda:") for d in devices)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env
