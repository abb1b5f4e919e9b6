"""A systemd unit for the daemon of this home."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from sftd.domain.spec.launchers import KINDS
from sftd.settings import Settings

# What the daemon and the training that it starts need from the shell that asked, as far as it is set there.
_TAKEN = (
    "PATH",
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "TMPDIR",
    "PYTHONPATH",
    *(name for kind in KINDS.values() for name in kind.variables),
)
_TAKEN_PREFIXES = ("SFTD_", "NCCL_", "MLFLOW_TRACKING_URI")
# Set by sftd itself, for one process.
_NOT_TAKEN = ("SFTD_HOME", "SFTD_DAEMON_LOG", "SFTD_ATTEMPT_TOKEN", "SFTD_DEVICE")
_SECRET = ("PASSWORD", "TOKEN", "SECRET", "KEY", "WEBHOOK", "NOTIFY_COMMAND")

_SERVICE = """\
# Training survives a stop, a restart and an upgrade of the daemon: only the daemon itself is ended, and the kernel's
# OOM killer taking a rank does not end it either.
KillMode=process
OOMPolicy=continue
TimeoutStopSec=60
Restart=always
RestartSec=5
UMask=0077
LimitNOFILE=65536
TasksMax=infinity
"""
# Left out, because training inherits it all: PrivateDevices and ProtectClock (they hide GPUs), MemoryDenyWriteExecute
# (Triton compiles), PrivateTmp (its folder would go with the daemon, under the feet of the ranks).
_SYSTEM = """\
LimitMEMLOCK=infinity
# CUDA cannot make its device files by itself under NoNewPrivileges.
ExecStartPre=-+/bin/sh -c 'command -v nvidia-modprobe >/dev/null && nvidia-modprobe -c 0 -u'
NoNewPrivileges=yes
ProtectSystem=full
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
"""


def unit(settings: Settings, kind: str, user: str, environ: Mapping[str, str]) -> str:
    """The unit's text. `kind` is "user" or "system"; a system unit runs as `user`."""
    return "".join(f"{line}\n" for line in _lines(settings, kind, user, environ))


def _lines(settings: Settings, kind: str, user: str, environ: Mapping[str, str]) -> Iterator[str]:
    is_system = kind == "system"
    secrets = settings.home / "daemon.env"
    where = "/etc/systemd/system/sftd.service" if is_system else "~/.config/systemd/user/sftd.service"
    control = "sudo systemctl" if is_system else "systemctl --user"
    yield f"# {where}, then: {control} daemon-reload && {control} enable --now sftd"
    if not is_system:
        yield "# To have it run while you are logged out: loginctl enable-linger"
    yield "[Unit]"
    yield "Description=sftd training daemon"
    if is_system:
        yield "Wants=network-online.target"
        yield "After=network-online.target"
    yield "StartLimitIntervalSec=0"
    yield ""
    yield "[Service]"
    yield "Type=exec"
    if is_system:
        yield f"User={user}"
    yield f"WorkingDirectory={_escaped(str(settings.home))}"
    yield f"ExecStart={_quoted(sys.executable, dollars=True)} -P -m sftd daemon"
    yield f"Environment={_quoted(f'SFTD_HOME={settings.home}')}"
    for name, value in sorted(environ.items()):
        if name in _NOT_TAKEN or not (name in _TAKEN or name.startswith(_TAKEN_PREFIXES)):
            continue
        if _is_secret(name, value):
            yield f"# {name} is set here, but holds a secret: write it into {secrets}"
        else:
            yield f"Environment={_quoted(f'{name}={value}')}"
    yield "# For what nobody else may read (mode 0600, NAME=VALUE lines): the URL of a database with its password."
    yield f"EnvironmentFile=-{_escaped(str(secrets))}"
    yield from _SERVICE.splitlines()
    if is_system:
        yield from _SYSTEM.splitlines()
    yield ""
    yield "[Install]"
    yield f"WantedBy={'multi-user.target' if is_system else 'default.target'}"


def _is_secret(name: str, value: str) -> bool:
    from sftd.domain.text.credentials import without_credentials

    return any(word in name for word in _SECRET) or without_credentials(value) != value


def _escaped(text: str) -> str:
    # Specifiers such as %h are replaced everywhere.
    return text.replace("%", "%%")


def _quoted(text: str, *, dollars: bool = False) -> str:
    text = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    # In a command, and only there, $NAME is replaced.
    return f'"{text.replace("$", "$$") if dollars else text}"'
