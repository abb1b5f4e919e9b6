"""A Slurm of our own: munged, slurmctld and two slurmd, each of these on a "host" of its own (network, host name and
/etc/hosts in Linux namespaces). Everything lies in one folder and ends with the test session.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.builders.claims import claim, port_of_our_own
from tests.builders.patience import PATIENCE, until

# Slurm names cgroups by its nodes, so those of two test processes must differ.
NODES = (f"p{os.getpid()}n1", f"p{os.getpid()}n2")
_FREEZER = Path("/sys/fs/cgroup/freezer")
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "ip", "unshare")
_CONF = """\
ClusterName=sftd
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_min_interval=1,sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
OverTimeLimit=0
KillWait=5
MinJobAge=300
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
InactiveLimit=0
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None when it can."""
    if os.getuid() != 0:
        return "only root can start a Slurm with two hosts"
    if missing := [name for name in _COMMANDS if which(name) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)"
    if not _FREEZER.is_dir():
        return f"{_FREEZER} is missing: Slurm needs it to find a job's leftover processes"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def which(name: str) -> str | None:
    """Debian's daemons lie where a user's PATH does not lead."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmCluster:
    """Two nodes and their controller."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = claim("network", range(20, 250), lambda n: not Path(f"/sys/class/net/sftd{n}").exists())
        self._net = f"10.213.{number}"
        self._bridge = f"sftd{number}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._left: dict[str, str] = {}
        self.conf = folder / "slurm.conf"
        os.environ["SLURM_CONF"] = str(self.conf)

    def start(self) -> None:
        """Start everything, and wait until both nodes are idle."""
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        lines = [
            f"NodeName={node} NodeAddr={self._net}.{i} NodeHostname={node} CPUs=8 State=UNKNOWN"
            for i, node in enumerate(NODES, 1)
        ]
        self.conf.write_text(
            _CONF.format(
                host=socket.gethostname(),
                controller=f"{self._net}.254",
                port=port_of_our_own(),
                slurmd_port=port_of_our_own(),
                folder=self.folder,
                nodes="\n".join(lines),
                names=",".join(NODES),
            )
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        hosts = [f"127.0.0.1 localhost\n{self._net}.254 {socket.gethostname()}"]
        hosts += [f"{self._net}.{i} {node}" for i, node in enumerate(NODES, 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        munge = self.folder / "munge"
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}",
        )  # fmt: skip
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"{self._net}.254/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")
        until((munge / "socket").exists, what="munged did not start")
        self.start_controller(clean=True)
        for node in NODES:
            self.start_node(node)
        until(self._is_idle, what=f"the nodes did not come up: {self._log()}")

    def restore(self) -> None:
        """Restart what a test has left dead, cancel its jobs, and wait until both nodes are idle."""
        if not self._runs("slurmctld"):
            self.start_controller()
        for node in NODES:
            if not self._runs(node):
                self.kill_node(node)
                self.start_node(node)
        self.run("scancel", "--user=root")
        until(self._is_idle, what=f"the nodes do not come back: {self._log()}")

    def _runs(self, name: str) -> bool:
        return name in self._processes and self._processes[name].poll() is None

    def _is_idle(self) -> bool:
        states = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True).stdout
        return states.split() == ["idle"] * len(NODES)

    def _log(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))

    def _spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        program = which(name)
        assert program is not None
        with open(self.folder / f"{name}.out", "ab") as out:
            self._processes[name] = subprocess.Popen(
                [program, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        return self._processes[name]

    def _ip(self, *arguments: str) -> None:
        program = which("ip")
        assert program is not None
        subprocess.run([program, *arguments], check=True, capture_output=True)

    def start_controller(self, *, clean: bool = False) -> None:
        """Start slurmctld; it continues from its saved state, unless `clean`."""
        self._spawn("slurmctld", "-D", *(["-c", "-i"] if clean else []), "-f", str(self.conf))
        until(
            lambda: not self.run("scontrol", "ping", check=False).returncode, what="slurmctld did not start"
        )

    def stop_controller(self) -> None:
        """Stop slurmctld; it saves its state."""
        self._end("slurmctld", signal.SIGTERM)

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name)
        process.send_signal(number)
        process.wait(timeout=PATIENCE)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, on a new "host" of that name."""
        number = NODES.index(node) + 1
        link = f"{self._bridge}v{number}"
        script = (
            f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts; read go; "
            f"ip link set lo up; ip addr add {self._net}.{number}/24 dev eth0; ip link set eth0 up; "
            f"exec {which('slurmd')} -D -N {node} -f {self.conf}"
        )
        with open(self.folder / f"slurmd-{node}.out", "ab") as out:
            process = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "bash", "-c", script],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            )
        self._processes[node] = process
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "del", link)
        own = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != own)
        peer = ("peer", "name", "eth0", "netns", str(process.pid))
        self._ip("link", "add", link, "type", "veth", *peer)
        self._ip("link", "set", link, "master", self._bridge, "up")
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()

    def kill_slurmd(self, node: str) -> None:
        """A node's slurmd dies, and what it has started lives on."""
        process = self._processes.pop(node)
        # One that died by itself has none any more.
        with contextlib.suppress(OSError):
            self._left[node] = os.readlink(f"/proc/{process.pid}/ns/net")
        process.kill()
        process.wait(timeout=PATIENCE)

    def kill_node(self, node: str) -> None:
        """The machine is gone: slurmd, if it still runs, and whatever it started, at once."""
        if node in self._processes:
            self.kill_slurmd(node)
        net = self._left.pop(node, None)
        if net in (None, os.readlink("/proc/self/ns/net")):
            # It had not come so far as to be a machine: what it is on is this one.
            return
        doomed = []
        for other in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{other.pid}/ns/net") == net:
                    other.kill()
                    doomed.append(other)
        psutil.wait_procs(doomed, timeout=60)

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
        assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
        return done

    def state(self, job: str) -> str:
        """The state of a job, empty when there is none."""
        done = self.run("squeue", "-h", "-t", "all", "-j", job, "-O", "State:|", check=False)
        return done.stdout.strip().strip("|")

    def limit(self, job: str, minutes_left: int) -> None:
        """Set a running job's time limit to `minutes_left` from now, or somewhat less: Slurm counts whole minutes."""
        shown = self.run("scontrol", "show", "job", job).stdout
        hours, minutes, _ = shown.split("RunTime=")[1].split()[0].split(":")
        self.run(
            "scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + minutes_left}"
        )

    def stop(self) -> None:
        """End it all."""
        for node in NODES:
            if node in self._processes or node in self._left:
                self.kill_node(node)
        for name in list(self._processes):
            self._end(name, signal.SIGKILL)
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "del", self._bridge)
        for node in NODES:
            # Kernel folders go one by one, the inner ones first.
            for path in sorted(_FREEZER.glob(f"slurm_{node}/**/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()
        del os.environ["SLURM_CONF"]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[SlurmCluster]:
    """A Slurm as long as the block lasts."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
