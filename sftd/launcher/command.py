"""The command and the environment of an attempt. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from sftd import settings
from sftd.domain.spec.spec import Spec
from sftd.wire.attempt.directory import AttemptDir

# Marks every process of an attempt, so that survivors can be found when the leader is gone.
TOKEN_VARIABLE = "SFTD_ATTEMPT_TOKEN"  # noqa: S105  a name, not a token
# The trainer talks to neither the database nor a mirror, and their URLs may hold passwords.
_WITHHELD = (*settings.WITHHELD, "PGPASSWORD")
# torchrun cannot say its exit code to a daemon that is not its parent, so a shell writes it down.
_WRITE_CODE = 'echo "$code" > "$0.partial" && mv "$0.partial" "$0"; exit "$code"'
_SHELL = f'"$@"; code=$?; {_WRITE_CODE}'
# Standard input is a pipe whose other end is its owner's alone: it ends with the owner, however that ends, SIGKILL included.
# The ranks end with torchrun.
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
        # As --standalone, but with a file in place of a port that would be open to the network.
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
    """The torchrun command of each of several machines. Where they meet comes by torchrun's variables (PET_…), for only the
    job knows its first machine."""
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
    """`argv` under a shell that leaves its exit code in the attempt's exit file. With `tied` it is killed when the shell's
    standard input ends."""
    return ["/bin/sh", "-c", _TIED_SHELL if tied else _SHELL, str(directory.exit_file), *argv]


def without_secrets(base: Mapping[str, str]) -> dict[str, str]:
    """The daemon's own environment, less what the trainer must not know."""
    return {name: value for name, value in base.items() if not name.startswith(_WITHHELD)}


def rank_variables(*, token: str, device: str) -> dict[str, str]:
    """What the environment of every rank says, whatever starts it."""
    return {
        TOKEN_VARIABLE: token,
        "SFTD_DEVICE": device,
        # No module is taken from the folder that a rank happens to start in.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# torchrun opens no port for the ranks of one host: they meet by themselves (see sftd/trainer/runtime/rendezvous.py).
ONE_HOST = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# They talk over shared memory and NVLink; what NCCL and gloo listen on is for finding each other.
ONE_HOST_DEFAULTS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def environment(
    base: Mapping[str, str], *, token: str, device: str, threads: int, devices: list[str]
) -> dict[str, str]:
    """Environment of an attempt on this host: the daemon's own, less what the trainer must not know, plus what it is to
    use."""
    env = ONE_HOST_DEFAULTS | without_secrets(base) | rank_variables(token=token, device=device) | ONE_HOST
    env["OMP_NUM_THREADS"] = str(threads)
    # NVML, which the devices are numbered by, counts in this order; CUDA by itself puts the fastest first.
    env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(d.removeprefix("cuda:") for d in devices)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env
