"""The batch script of an attempt that Slurm runs. Pure: the same order gives the same text."""

from __future__ import annotations

import shlex

from sftd.domain.spec.launch.slurm import asks_for_gpus
from sftd.domain.spec.spec import Spec
from sftd.launcher.command import (
    ONE_HOST,
    ONE_HOST_DEFAULTS,
    rank_variables,
    torchrun_argv,
    torchrun_argv_of_node,
)
from sftd.wire.attempt.directory import AttemptDir, Order

# The exit code of a job whose attempt is fenced or already started: EX_TEMPFAIL of sysexits.h.
REFUSED = 75


def job_name(run_id: str, attempt: int) -> str:
    """The name of an attempt's job, for users."""
    return f"sftd-{run_id}-{attempt}"


def device(spec: Spec) -> str:
    """The device of the ranks. `auto` is GPUs if the job requests any, else CPUs."""
    if spec.launch.device != "auto":
        return spec.launch.device
    return "cuda" if asks_for_gpus(spec.launch.slurm) else "cpu"


def argv(spec: Spec, directory: AttemptDir) -> list[str]:
    """The torchrun command of each of the job's machines."""
    return (torchrun_argv if spec.launch.nnodes == 1 else torchrun_argv_of_node)(spec, directory)


def script(order: Order, directory: AttemptDir, torchrun: list[str] | None = None) -> str:
    """The job's script, which runs `torchrun` (default: `argv`) on each machine."""
    spec = order.spec
    kind = device(spec)
    variables = rank_variables(token=order.token, device=kind)
    lines = [
        "#!/bin/bash",
        f"# Attempt {order.attempt} of {order.run_id}, written by sftd. It starts once and in this folder only: to train again,",
        f"# use `sftd resume {order.run_id}`.",
        *(f"#SBATCH {option}" for option in options(order, directory)),
        "",
        "umask 077",
        f"cd {shlex.quote(str(directory.path))} || exit {REFUSED}",
        "",
        "# An attempt has one writer: a job that Slurm requeued, or that the daemon abandoned, ends here. mkdir succeeds only",
        "# once, on all machines together.",
        f"if [ -e {directory.fence_file.name} ] || ! mkdir {directory.started_dir.name}; then",
        '    echo "sftd: job $SLURM_JOB_ID may not run this attempt (abandoned, or started before): nothing was started" >&2',
        f"    exit {REFUSED}",
        "fi",
        f'echo "$SLURM_JOB_ID" > {directory.started_job_file.relative_to(directory.path)}',
        "",
        "# The time limit or a preemption is near: the ranks save a checkpoint at the next step and end.",
        "stop() {",
        f'    echo "$1" > {directory.told_file.name}',
        f"    touch {directory.stop_file.name}",
        "    interrupted=1",
        "}",
        "trap 'stop USR1' USR1",
        "trap 'stop TERM' TERM",
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *_threads(spec),
    ]
    if kind == "cpu":
        lines.append("export CUDA_VISIBLE_DEVICES=")
    if spec.launch.nnodes == 1:
        lines += [f"export {name}={value}" for name, value in ONE_HOST.items()]
        lines += [f'export {name}="${{{name}:-{value}}}"' for name, value in ONE_HOST_DEFAULTS.items()]
    if spec.launch.slurm.setup.strip():
        lines += ["", "# launch.slurm.setup", spec.launch.slurm.setup.rstrip()]
        # With -e, a signal that interrupts `wait` would end the script and the ranks.
        lines += ["", "set +eu", f"cd {shlex.quote(str(directory.path))} || exit {REFUSED}"]
    lines += ["", *_start(spec, torchrun or argv(spec, directory))]
    return "\n".join(lines) + "\n"


def options(order: Order, directory: AttemptDir) -> list[str]:
    """sbatch's options in the script."""
    launch = order.spec.launch
    slurm = launch.slurm
    gres = slurm.gres
    if not gres and device(order.spec) == "cuda" and not asks_for_gpus(slurm):
        gres = f"gpu:{order.spec.nproc_per_node}"
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "gres": gres,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
    }
    return [
        f"--job-name={job_name(order.run_id, order.attempt)}",
        # sbatch expands % in the name of an output file.
        f"--output={_quoted(str(directory.output_log).replace('%', '%%'))}",
        "--open-mode=append",
        f"--chdir={_quoted(str(directory.path))}",
        # sftd starts the next attempt itself, from the checkpoint in the log.
        "--no-requeue",
        f"--signal=B:USR1@{slurm.stop_seconds}",
        f"--nodes={launch.nnodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={_cpus(order.spec)}",
        *(f"--{name}={value}" for name, value in named.items() if value),
        *slurm.extra_args,
    ]


def _cpus(spec: Spec) -> int:
    """Number of cores per machine, shared by its ranks."""
    return spec.nproc_per_node * (spec.launch.threads_per_rank or 1)


def _quoted(path: str) -> str:
    """Quote a path for sbatch's option parser."""
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return path if path == escaped and not set(path) & set(" \t'#") else f'"{escaped}"'


def _threads(spec: Spec) -> list[str]:
    if spec.launch.threads_per_rank is not None:
        return [f"export OMP_NUM_THREADS={spec.launch.threads_per_rank}"]
    return [
        "# The ranks of a machine share the cores that the job has there.",
        f"threads=$(( SLURM_CPUS_ON_NODE / {spec.nproc_per_node} ))",
        "export OMP_NUM_THREADS=$(( threads > 1 ? threads : 1 ))",
    ]


def _start(spec: Spec, torchrun: list[str]) -> list[str]:
    nodes = spec.launch.nnodes
    command = " ".join(shlex.quote(word) for word in torchrun)
    lines = []
    if nodes > 1:
        free = 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
        lines += [
            "# The rendezvous is on the first machine, which runs this script.",
            f"port=$({shlex.quote(torchrun[0])} -c {shlex.quote(free)})",
            'export PET_RDZV_ENDPOINT="$SLURMD_NODENAME:$port"',
            "",
            "# One torchrun for each machine. When one fails, srun ends the others.",
        ]
        inner = (
            'PET_RDZV_CONF=is_host=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false) '
            'PET_LOCAL_ADDR="$SLURMD_NODENAME" exec "$@"'
        )
        command = f"bash -c {shlex.quote(inner)} torchrun {command}"
    lines += [
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task={_cpus(spec)} --kill-on-bad-exit=1 \\",
        f"    {command} &",
        "step=$!",
        "# A signal interrupts `wait` before the exit code is known.",
        "interrupted=1",
        'while [ "$interrupted" ]; do',
        "    interrupted=",
        '    wait "$step"',
        "    code=$?",
        "done",
        'echo "$code" > exit.partial && mv exit.partial exit',
        'exit "$code"',
    ]
    return lines
