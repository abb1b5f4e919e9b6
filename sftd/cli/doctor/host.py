"""The checks of `sftd doctor` on this host: Python, torch, devices, disk, limits, ports, clock."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftd.cli.terminal import output
from sftd.domain.finding import Finding, broken, ok, warning
from sftd.settings import Settings, sqlite_file

_OLDEST_PYTHON = (3, 12)
_PROBE_SECONDS = 180.0
_GIB = 2**30
_LOW_BYTES, _NONE_BYTES = 20 * _GIB, _GIB
_WRITTEN_BYTES = 64 * 2**20
_SLOW_BYTES_PER_SECOND = 50e6
_FILES = 4096
_SHARED = "/dev/shm"  # noqa: S108  what NCCL and torch use
_SHARED_BYTES = _GIB
# SQLite's locks and write-ahead log need memory that only one host has: not safe on these file systems.
_REMOTE = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "fuse.sshfs",
    "lustre",
    "beegfs",
    "ceph",
    "glusterfs",
)


def python() -> Iterator[Finding]:
    """The interpreter."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _OLDEST_PYTHON:
        yield broken("Python", text, "use Python 3.12 or later: PYTHON=/path/to/python3.12 make install")
    else:
        yield ok("Python", text)


def trainer(nvml: int | None) -> Iterator[Finding]:
    """torch, Megatron-core, the GPUs and NCCL, as a training process sees them. `nvml` is the number of GPUs that NVML lists
    and CUDA_VISIBLE_DEVICES does not hide; None if unknown."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sftd.trainer.tools.probe"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        what = f"importing torch, or NCCL's first sum, took more than {_PROBE_SECONDS:.0f} s"
        yield broken(
            "torch", what, f"run `{sys.executable} -m sftd.trainer.tools.probe` to see where it hangs"
        )
        return
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield broken("torch", last, "install sftd again: `make clean install` in its checkout, or its wheel")
        return
    found: dict[str, Any] = json.loads(done.stdout)
    cuda = f"CUDA {found['cuda']}" if found["cuda"] else "without CUDA"
    yield ok("torch", f"{found['torch']} ({cuda}), Megatron-core {found['megatron_core']}")
    if nvml is not None and nvml != found["gpus"]:
        fix = "install a torch that is built for the driver's CUDA; CUDA_VISIBLE_DEVICES must name existing GPUs"
        yield broken("NCCL", f"torch sees {found['gpus']} of {nvml} GPUs", fix)
    elif found["nccl_error"]:
        fix = "run `NCCL_DEBUG=INFO python -m sftd.trainer.tools.probe` for details; often /dev/shm or the driver is the cause"
        yield broken("NCCL", f"{found['nccl']}: {found['nccl_error']}", fix)
    elif found["gpus"]:
        yield ok("NCCL", f"{found['nccl']}, sums over {found['gpus']} GPUs")


def gpus() -> tuple[int | None, list[Finding]]:
    """The number of GPUs that runs may use (None if NVML is not available), and the findings about all GPUs."""
    from sftd.domain.errors import Refused
    from sftd.launcher.inventory import nvml
    from sftd.wire.cores import usable_cores

    try:
        with nvml() as library:
            if library is not None:
                return _gpus(library)
    except Refused as refused:
        return None, [broken(p.where, p.what, p.fix) for p in refused.problems]
    return None, [ok("devices", f"no GPU: runs train on CPU cores ({usable_cores()} here)")]


def _gpus(pynvml: Any) -> tuple[int, list[Finding]]:
    from sftd.launcher import inventory

    names: dict[str, int] = {}
    found: list[Finding] = []
    count = int(pynvml.nvmlDeviceGetCount())
    for index in range(count):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = f"{_text(pynvml.nvmlDeviceGetName(handle))} {memory.total / _GIB:.0f} GiB"
        names[name] = names.get(name, 0) + 1
        users = [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        foreign = [pid for pid in users if not _is_ours(pid)]
        if foreign:
            fix = "sftd still gives this GPU to runs: end those processes, or leave it out of the daemon's CUDA_VISIBLE_DEVICES"
            pids = ", ".join(map(str, foreign))
            found.append(warning("devices", f"GPU {index} is used by other processes (pids {pids})", fix))
    driver = _text(pynvml.nvmlSystemGetDriverVersion())
    listed = ", ".join(f"{n} × {name}" for name, n in names.items()) or "no GPU"
    may = len(inventory.visible_gpus())
    hidden = f", of which CUDA_VISIBLE_DEVICES leaves {may} to sftd" if may != count else ""
    return may, [ok("devices", f"{listed}{hidden}, driver {driver}"), *found]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_ours(pid: int) -> bool:
    from sftd.launcher.command import TOKEN_VARIABLE

    try:
        return f"\0{TOKEN_VARIABLE}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        # A process of another user, or of a container that hides it.
        return False


def disk(settings: Settings) -> Iterator[Finding]:
    """SFTD_HOME: permissions, file system, free space, write speed."""
    home = settings.home
    mode = home.stat().st_mode & 0o777
    if mode & 0o077:
        yield warning(
            "home",
            f"{home} has mode {mode:04o}: other users can read it",
            f"chmod 700 {shlex.quote(str(home))}",
        )
    else:
        yield ok("home", f"{home}, mode {mode:04o}")
    for name, file in _sqlite_files(settings):
        if (kind := _file_system(file)) in _REMOTE:
            fix = "name a file on a local disk, or a server: PostgreSQL (SFTD_DATABASE_URL), MLflow's (MLFLOW_TRACKING_URI)"
            yield broken("disk", f"{name} ({file}): SQLite is not safe on {kind}", fix)
    free = shutil.disk_usage(home).free
    fix = "lower checkpoint.keep_last, or give checkpoint.save_dir another disk: a checkpoint takes 12 to 16 bytes a parameter"
    if free < _NONE_BYTES:
        yield broken("disk", f"{output.size(free)} free", fix)
        return
    seconds = _write_seconds(home / f".doctor.{os.getpid()}")
    speed = _WRITTEN_BYTES / seconds
    text = f"{output.size(free)} free, {output.size(int(speed))}/s written and synced"
    if free < _LOW_BYTES:
        yield warning("disk", text, fix)
    elif speed < _SLOW_BYTES_PER_SECOND:
        yield warning(
            "disk", text, "checkpoints will delay training: use a faster disk for checkpoint.save_dir"
        )
    else:
        yield ok("disk", text)


def _sqlite_files(settings: Settings) -> Iterator[tuple[str, Path]]:
    for name, url in (
        ("the database", settings.database_url),
        ("MLflow's database", settings.mlflow_tracking_uri),
    ):
        if (file := sqlite_file(url)) is not None:
            yield name, file


def _file_system(file: Path) -> str:
    """The type of the file system that holds, or will hold, a file."""
    import psutil

    mounts = [m for m in psutil.disk_partitions(all=True) if file.is_relative_to(m.mountpoint)]
    return str(max(mounts, key=lambda m: len(m.mountpoint)).fstype) if mounts else ""


def _write_seconds(path: Path) -> float:
    data = os.urandom(2**20)
    started = time.perf_counter()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as file:
            file.writelines(data for _ in range(_WRITTEN_BYTES // len(data)))
            file.flush()
            os.fsync(fd)
    finally:
        path.unlink(missing_ok=True)
    return time.perf_counter() - started


def limits() -> Iterator[Finding]:
    """Open files and shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        fix = f"`ulimit -n {min(hard, 65536) if hard > 0 else 65536}` before the daemon, or LimitNOFILE= in its unit"
        yield warning("open files", f"at most {soft}: data loaders and NCCL may run out", fix)
    else:
        yield ok("open files", f"at most {'any number' if soft == resource.RLIM_INFINITY else soft}")
    try:
        size = shutil.disk_usage(_SHARED).total
    except OSError as error:
        yield warning("shared memory", f"{_SHARED}: {error.strerror}", "mount a tmpfs there")
        return
    if size < _SHARED_BYTES:
        fix = "give the container more: `docker run --shm-size=8g`, or --ipc=host"
        yield warning("shared memory", f"{_SHARED} has {output.memory(size)}: NCCL may fail", fix)
    else:
        yield ok("shared memory", f"{_SHARED} has {output.memory(size)}")


def ports() -> Iterator[Finding]:
    """Whether ranks can meet on a free port of this host's loopback device."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    except OSError as error:
        yield broken("ports", f"no port on localhost: {error}", "check /etc/hosts and the loopback device")
        return
    if outside := sorted(str(a) for a in addresses if a != "::1" and not str(a).startswith("127.")):
        fix = "write `127.0.0.1 localhost` into /etc/hosts"
        yield broken("ports", f"localhost is {', '.join(outside)}: ranks would listen on the network", fix)
        return
    yield ok("ports", f"free on localhost (such as {port}); sftd opens none to the network")


def clock() -> Iterator[Finding]:
    """Whether NTP synchronises this host's clock."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    try:
        done = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
        synchronised = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        synchronised = ""
    if synchronised == "no":
        fix = (
            "turn on NTP (`timedatectl set-ntp true`): events are ordered by the log, but dated by this clock"
        )
        yield warning("clock", f"{now}, not synchronised", fix)
    else:
        yield ok("clock", f"{now}, {'synchronised' if synchronised else 'not checked against NTP'}")
