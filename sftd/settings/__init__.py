"""The environment of the control plane, read once. A value comes from the environment, else from
`SFTD_HOME/config.toml`, else it has the default written here."""

from __future__ import annotations

import os
import shlex
import tomllib
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# What a person can be told of; `domain/notices.py` says which events that is.
NOTIFY_KINDS = ("ended", "failed", "anomaly", "started", "retrying", "paused")


class SettingsError(Exception):
    """A setting cannot be used."""


@dataclass(frozen=True)
class Settings:
    """`home`: all state. `database_url`: SQLAlchemy's form. `mlflow_tracking_uri`: MLflow's form; empty turns the mirror
    off. `cpu_slots`: CPU cores that runs may use on a host without GPUs; None is all of them. Times are seconds. `log_format`: "text" or "json".
    `metrics_file`: what the daemon writes for Prometheus. `user_limit`, `project_limit`: devices that the runs
    of one user or project may have at once; None is no limit. `device_price`: what a device costs an hour, None
    unknown. `notify_command` and `notify_webhook` are told of what `notify_on` names; empty is none. `sample_seconds`:
    how often an attempt's host is looked at. `slurm_jobs`: jobs that the daemon has on Slurm at once;
    `slurm_poll_seconds`: how often it asks the controller about all of them."""

    home: Path
    database_url: str
    mlflow_tracking_uri: str
    cpu_slots: int | None
    backoff_seconds: float
    lease_seconds: float
    poll_seconds: float
    log_format: str
    metrics_file: Path
    user_limit: int | None = None
    project_limit: int | None = None
    device_price: float | None = None
    # Both may hold secrets.
    notify_command: str = field(default="", repr=False)
    notify_webhook: str = field(default="", repr=False)
    notify_on: tuple[str, ...] = NOTIFY_KINDS[:3]
    sample_seconds: float = 30.0
    slurm_jobs: int = 100
    slurm_poll_seconds: float = 10.0

    @property
    def silent_micros(self) -> int:
        """A daemon that has not renewed its row for this many µs is not observed. Daemons renew it three times in a lease."""
        return int(2 * self.lease_seconds * 1_000_000)

    @property
    def logs(self) -> Path:
        """Folder of the daemon's own log."""
        return self.home / "logs"

    @property
    def daemon_lock(self) -> Path:
        """File that the running daemon of this home holds locked."""
        return self.home / "daemon.lock"

    @property
    def mlflow_artifacts(self) -> Path:
        """Folder of MLflow's artifacts when its store is the embedded one."""
        return self.home / "mlartifacts"


def full_database_url(url: str) -> str:
    """A database URL as SQLAlchemy needs it: with its driver, and with an absolute path of a file."""
    # People and hosting services write the scheme without a driver; SQLAlchemy's default one is not installed.
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url[len(scheme) :]
    return _absolute_sqlite(url)


def sqlite_url(file: Path) -> str:
    """SQLAlchemy's URL of a SQLite file, whatever characters its path holds."""
    # Only what means something in a URL is quoted: MLflow's mirror is known by this text, which must not change.
    quoted = "".join(urllib.parse.quote(c) if c in "%?#" else c for c in str(file))
    return f"sqlite:///{quoted}"


def sqlite_file(url: str) -> Path | None:
    """The file that a SQLite URL names; None for another database, and for one in memory."""
    scheme, _, rest = url.partition(":///")
    path = urllib.parse.unquote(rest.partition("?")[0])
    if scheme.partition("+")[0] != "sqlite" or not path or path.startswith(":"):
        return None
    return Path(path)


def _absolute_sqlite(url: str) -> str:
    """The daemon runs in another folder than the command that started it, so a relative file is made absolute."""
    file = sqlite_file(url)
    if file is None or file.is_absolute():
        return url
    _, mark, query = url.partition("?")
    return sqlite_url(Path(os.path.abspath(file))) + mark + query


def _command(text: str, where: str) -> str:
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}: it is split as a shell would, but run without one") from None
    return text if argv else ""


def _webhook(url: str, where: str) -> str:
    """The URL, which no message quotes: it is a secret."""
    try:
        parsed = urllib.parse.urlsplit(url)
        usable = parsed.scheme in ("http", "https") and parsed.hostname and (parsed.port or True)
    except ValueError:
        usable = False
    if url and (not usable or any(not "!" <= letter <= "~" for letter in url)):
        raise SettingsError(f"{where}: it is not a URL such as https://host/path")
    if url and "@" in parsed.netloc:
        raise SettingsError(
            f"{where}: a user and a password in the URL are not sent; put a token into its path"
        )
    return url


def _kinds(value: object, where: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else str(value).split(",")
    kinds = tuple(str(name).strip() for name in names if str(name).strip())
    if unknown := [kind for kind in kinds if kind not in NOTIFY_KINDS]:
        raise SettingsError(f"{where}: {unknown[0]!r} is none of {', '.join(NOTIFY_KINDS)}")
    if not kinds:
        raise SettingsError(f"{where}: it names nothing; name some of {', '.join(NOTIFY_KINDS)}")
    return kinds


# What may stand in config.toml; `limits` is a table.
_LIMITS = ("user", "project")
_KEYS = (
    "database_url",
    "mlflow_tracking_uri",
    "cpu_slots",
    "backoff_seconds",
    "lease_seconds",
    "poll_seconds",
    "log_format",
    "metrics_file",
    "limits",
    "device_price",
    "notify_command",
    "notify_webhook",
    "notify_on",
    "sample_seconds",
    "slurm_jobs",
    "slurm_poll_seconds",
)


def _refuse_unknown(stored: Mapping[str, object], file: Path) -> None:
    """A misspelt limit would hold nobody back."""
    limits = stored.get("limits")
    parts: list[tuple[str, Mapping[str, object], tuple[str, ...]]] = [("", stored, _KEYS)]
    if isinstance(limits, dict):
        parts.append((" under [limits]", limits, _LIMITS))
    for where, table, known in parts:
        for key in table:
            if key not in known:
                import difflib

                near = difflib.get_close_matches(key, known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
                raise SettingsError(f"{file}: {key}{where} is no setting. {hint}")


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises `SettingsError` naming the setting that cannot be used."""
    home = Path(environ.get("SFTD_HOME") or "~/.sftd").expanduser().absolute()
    file = home / "config.toml"
    stored: dict[str, object] = {}
    if file.is_file():
        try:
            stored = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file}: {error}") from None

    _refuse_unknown(stored, file)

    def value(name: str, default: str, variable: str | None = None) -> str:
        assert name in _KEYS
        return environ.get(variable or "SFTD_" + name.upper()) or str(stored.get(name, default))

    def number(name: str, default: float) -> float:
        text = value(name, str(default))
        try:
            parsed = float(text)
        except ValueError:
            parsed = -1.0
        if not 0 < parsed < float("inf"):
            raise SettingsError(
                f"SFTD_{name.upper()} (or `{name}` in {file}): {text!r} is not a number above 0"
            )
        return parsed

    log_format = value("log_format", "text")
    if log_format not in ("text", "json"):
        raise SettingsError(
            f"SFTD_LOG_FORMAT (or `log_format` in {file}): {log_format!r} is neither text nor json"
        )

    def limit(name: str) -> int | None:
        variable = f"SFTD_LIMIT_{name.upper()}"
        table = stored.get("limits", {})
        if not isinstance(table, dict):
            raise SettingsError(f"{file}: write `[limits]` and, below it, `user = N` or `project = N`")
        text = environ.get(variable) or str(table.get(name, ""))
        if not text:
            return None
        if not text.isdecimal() or int(text) == 0:
            what = f"{variable} (or `{name}` under [limits] in {file}): {text!r} is not a number of devices above 0"
            raise SettingsError(what)
        return int(text)

    tracking = environ.get("MLFLOW_TRACKING_URI")
    if tracking is None:
        tracking = str(stored.get("mlflow_tracking_uri", sqlite_url(home / "mlflow.db")))
    return Settings(
        home=home,
        database_url=full_database_url(value("database_url", sqlite_url(home / "sftd.db"))),
        mlflow_tracking_uri=_absolute_sqlite(tracking),
        cpu_slots=max(1, int(number("cpu_slots", 1))) if value("cpu_slots", "") else None,
        backoff_seconds=number("backoff_seconds", 15.0),
        lease_seconds=number("lease_seconds", 30.0),
        poll_seconds=number("poll_seconds", 0.25),
        log_format=log_format,
        metrics_file=Path(value("metrics_file", str(home / "metrics.prom"))).expanduser().absolute(),
        user_limit=limit("user"),
        project_limit=limit("project"),
        device_price=number("device_price", 1.0) if value("device_price", "") else None,
        notify_command=_command(
            value("notify_command", ""), f"SFTD_NOTIFY_COMMAND (or `notify_command` in {file})"
        ),
        notify_webhook=_webhook(
            value("notify_webhook", "").strip(), f"SFTD_NOTIFY_WEBHOOK (or `notify_webhook` in {file})"
        ),
        notify_on=_kinds(
            environ.get("SFTD_NOTIFY_ON") or stored.get("notify_on", list(NOTIFY_KINDS[:3])),
            f"SFTD_NOTIFY_ON (or `notify_on` in {file})",
        ),
        sample_seconds=number("sample_seconds", 30.0),
        slurm_jobs=int(number("slurm_jobs", 100)),
        slurm_poll_seconds=number("slurm_poll_seconds", 10.0),
    )
