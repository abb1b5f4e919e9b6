"""The unit that `sftd daemon --print-systemd` prints, read by systemd itself where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftd.cli import main
from sftd.cli.daemon import systemd
from sftd.settings import read

SECRET = "hush-hush-9"
ENVIRON = {
    "PATH": "/opt/a b/bin:/usr/bin",
    "SFTD_CPU_SLOTS": "4",
    "SFTD_HOME": "/elsewhere",
    "NCCL_SOCKET_IFNAME": "eth0",
    "MLFLOW_TRACKING_URI": "http://mlflow:5000/50%",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "SFTD_DATABASE_URL": f"postgresql://ada:{SECRET}@host/db",
    "HF_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "EDITOR": "vi",
}


def unit(kind: str, home: Path) -> str:
    return systemd.unit(read({"SFTD_HOME": str(home)}), kind, "ada", ENVIRON)


@pytest.mark.parametrize("kind", ["user", "system"])
def test_the_unit(kind: str, tmp_path: Path) -> None:
    home = tmp_path / "a home of 100% \\ $5"
    lines = unit(kind, home).splitlines()
    for line in ("KillMode=process", "Restart=always", "OOMPolicy=continue", "TimeoutStopSec=60"):
        assert line in lines
    assert ("User=ada" in lines) == (kind == "system")
    assert ("NoNewPrivileges=yes" in lines) == (kind == "system")
    escaped = str(home).replace("%", "%%")
    assert f"WorkingDirectory={escaped}" in lines
    quoted = escaped.replace("\\", "\\\\")
    taken = [line for line in lines if line.startswith("Environment=")]
    assert taken == [
        f'Environment="SFTD_HOME={quoted}"',
        'Environment="MLFLOW_TRACKING_URI=http://mlflow:5000/50%%"',
        'Environment="NCCL_SOCKET_IFNAME=eth0"',
        'Environment="PATH=/opt/a b/bin:/usr/bin"',
        'Environment="SFTD_CPU_SLOTS=4"',
        'Environment="SLURM_CONF=/etc/slurm/slurm.conf"',
    ]
    assert any(line.startswith("# SFTD_DATABASE_URL is set here, but contains a secret") for line in lines)
    assert SECRET not in "\n".join(lines)


@pytest.mark.parametrize("kind", ["user", "system"])
def test_systemd_understands_every_line(kind: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    file = tmp_path / "sftd.service"

    def verify(text: str) -> str:
        file.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", f"--{kind}", "verify", str(file)],
            env={"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        # Of units of the system's own it may complain as it likes.
        said = [line for line in done.stderr.splitlines() if "sftd" in line or str(tmp_path) in line]
        return "\n".join(said) + (f"exit code {done.returncode}" if done.returncode else "")

    text = unit(kind, tmp_path / "a home of 100%")
    assert verify(text) == ""
    assert verify(text.replace("KillMode=process", "KillMode=nobody")) != ""
    assert verify(text.replace("ExecStart=", "ExecStart=/nowhere/")) != ""


def test_the_command_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("SFTD_HOME", str(home))
    shown = CliRunner().invoke(main, ["daemon", "--print-systemd"])
    assert shown.exit_code == 0
    assert "WantedBy=default.target" in shown.stdout
    system = CliRunner().invoke(main, ["daemon", "--print-systemd", "system"])
    assert "WantedBy=multi-user.target" in system.stdout
    assert not home.exists(), "printing makes nothing"
