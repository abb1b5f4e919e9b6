"""A systemd unit for the daemon of this home."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from sftd.domain.spec.launch.launchers import KINDS
from sftd.settings import Settings

# Variables that the daemon and its training need from the shell, if they are set there.
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
# Training survives a stop, a restart and an upgrade of the daemon: systemd ends only the daemon itself. If the OOM
# killer ends a rank, the daemon continues.
KillMode=process
OOMPolicy=continue
TimeoutStopSec=60
Restart=always
RestartSec=5
UMask=0077
LimitNOFILE=65536
TasksMax=infinity
"""
# Training inherits all of this. Left out: PrivateDevices and ProtectClock (they hide GPUs), MemoryDenyWriteExecute
# (Triton compiles code), PrivateTmp (a stop of the daemon would delete the folder that ranks use).
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
        yield "# To keep it running after you log out: loginctl enable-linger"
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
            yield f"# {name} is set here, but contains a secret: write it into {secrets}"
        else:
            yield f"Environment={_quoted(f'{name}={value}')}"
    yield "# For secrets (mode 0600, NAME=VALUE lines), such as the URL of a database with its password."
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
    # systemd replaces specifiers such as %h everywhere.
    return text.replace("%", "%%")


def _quoted(text: str, *, dollars: bool = False) -> str:
    text = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    # systemd replaces $NAME only in a command.
    return f'"{text.replace("$", "$$") if dollars else text}"'
