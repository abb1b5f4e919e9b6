"""Settings of the control plane, read once. Each value is from the environment, else from `SFTD_HOME/config.toml`, else the
default below."""

from __future__ import annotations

import os
import shlex
import tomllib
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

# The kinds of notices; `domain/notices.py` maps them to events.
NOTIFY_KINDS = ("ended", "failed", "anomaly", "started", "retrying", "paused", "evaluated")
# Prefixes of variables that may hold secrets and that trainers do not need.
WITHHELD = ("SFTD_DATABASE_URL", "MLFLOW_TRACKING_", "SFTD_NOTIFY_")

# A description completes the message "'x' is not …".
Positive = Annotated[float, Meta(gt=0, lt=1e300, description="a number above 0")]
Count = Annotated[int, Meta(ge=1, description="a whole number above 0")]
Devices = Annotated[int, Meta(ge=1, description="a number of devices above 0")]


class SettingsError(Exception):
    """A setting cannot be used."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings. Times are in seconds. `home`: folder of all state. `database_url`: in SQLAlchemy's form.
    `mlflow_tracking_uri`: in MLflow's form; empty turns the mirror off. `metrics_file`: the daemon's file for Prometheus.
    `cpu_slots`: CPU cores for runs on a host without GPUs; None is all. `user_limit`, `project_limit`: maximum devices of a
    user's or project's runs at a time; None is no limit. `device_price`: price per device and hour; None is unknown.
    `notify_command`, `notify_webhook`: receivers of the notices in `notify_on`; empty is none. `sample_seconds`: interval
    between samples of an attempt's host. `slurm_jobs`: maximum Slurm jobs of the daemon at a time. `slurm_poll_seconds`:
    interval between queries of the Slurm controller for all jobs."""

    home: Path
    database_url: str
    mlflow_tracking_uri: str
    metrics_file: Path
    cpu_slots: Count | None = None
    backoff_seconds: Positive = 15.0
    lease_seconds: Positive = 30.0
    poll_seconds: Positive = 0.25
    log_format: Literal["text", "json"] = "text"
    user_limit: Devices | None = None
    project_limit: Devices | None = None
    device_price: Positive | None = None
    notify_command: str = ""
    notify_webhook: str = ""
    notify_on: tuple[str, ...] = NOTIFY_KINDS[:3]
    sample_seconds: Positive = 30.0
    slurm_jobs: Count = 100
    slurm_poll_seconds: Positive = 10.0

    def __repr__(self) -> str:
        # The other fields may hold secrets.
        return f"Settings(home={str(self.home)!r})"

    @property
    def lease_micros(self) -> int:
        """Duration of a lease in µs, unless it is renewed."""
        return int(self.lease_seconds * 1_000_000)

    @property
    def silent_micros(self) -> int:
        """Duration in µs without a renewal after which a daemon counts as silent. Daemons renew three times per lease."""
        return 2 * self.lease_micros

    @property
    def logs(self) -> Path:
        """Folder of the daemon's own log."""
        return self.home / "logs"

    @property
    def daemon_lock(self) -> Path:
        """Lock file of the daemon that runs in this home."""
        return self.home / "daemon.lock"

    @property
    def mlflow_artifacts(self) -> Path:
        """Folder of MLflow's artifacts if the embedded store is used."""
        return self.home / "mlartifacts"


def full_database_url(url: str) -> str:
    """A database URL for SQLAlchemy: with a driver, and with an absolute path for SQLite."""
    # Users and hosting services omit the driver, but SQLAlchemy's default driver is not installed.
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url[len(scheme) :]
    return _absolute_sqlite(url)


def sqlite_url(file: Path) -> str:
    """SQLAlchemy's URL of a SQLite file with any characters in its path."""
    # Only characters with a meaning in URLs are quoted. This text identifies MLflow's mirror, so it must not change.
    quoted = "".join(urllib.parse.quote(c) if c in "%?#" else c for c in str(file))
    return f"sqlite:///{quoted}"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for other databases and for one in memory."""
    scheme, _, rest = url.partition(":///")
    path = urllib.parse.unquote(rest.partition("?")[0])
    if scheme.partition("+")[0] != "sqlite" or not path or path.startswith(":"):
        return None
    return Path(path)


def _absolute_sqlite(url: str) -> str:
    """The URL with an absolute path, because the daemon runs in another folder than the command that started it."""
    file = sqlite_file(url)
    if file is None or file.is_absolute():
        return url
    _, mark, query = url.partition("?")
    return sqlite_url(Path(os.path.abspath(file))) + mark + query


def _command(text: str) -> str:
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{error}: it is split as in a shell, but run without one") from None
    return text if argv else ""


def _webhook(given: str) -> str:
    """The checked URL. It is a secret, so no message may quote it."""
    url = given.strip()
    try:
        parsed = urllib.parse.urlsplit(url)
        usable = parsed.scheme in ("http", "https") and parsed.hostname and (parsed.port or True)
    except ValueError:
        usable = False
    if url and (not usable or any(not "!" <= letter <= "~" for letter in url)):
        raise ValueError("it is not a URL such as https://host/path")
    if url and "@" in parsed.netloc:
        raise ValueError("a user and a password in the URL are not sent; use a token in its path")
    return url


def _kinds(value: object) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    kinds = [str(name).strip() for name in names if str(name).strip()]
    if unknown := [kind for kind in kinds if kind not in NOTIFY_KINDS]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(NOTIFY_KINDS)}")
    if not kinds:
        raise ValueError(f"it is empty; use one or more of {', '.join(NOTIFY_KINDS)}")
    return kinds


# Conversion of a value before its type is checked. The text of a ValueError ends the error message.
_PREPARED: dict[str, Callable[[Any], object]] = {
    "database_url": lambda url: full_database_url(str(url)),
    "mlflow_tracking_uri": lambda url: _absolute_sqlite(str(url)),
    "metrics_file": lambda file: Path(str(file)).expanduser().absolute(),
    "notify_command": lambda text: _command(str(text)),
    "notify_webhook": lambda url: _webhook(str(url)),
    "notify_on": _kinds,
}
# (variable, key of config.toml) of settings that do not follow the default (SFTD_NAME, name).
_NAMES = {
    "mlflow_tracking_uri": ("MLFLOW_TRACKING_URI", "mlflow_tracking_uri"),
    "user_limit": ("SFTD_LIMIT_USER", "limits.user"),
    "project_limit": ("SFTD_LIMIT_PROJECT", "limits.project"),
}


def _stored(file: Path, known: list[str]) -> dict[str, object]:
    """Key → value of config.toml; keys of `[limits]` get the prefix `limits.`. An unknown key is an error, because a misspelt
    limit would have no effect. Raises `SettingsError`."""
    if not file.is_file():
        return {}
    try:
        stored = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    limits = stored.pop("limits", {})
    if not isinstance(limits, dict):
        raise SettingsError(f"{file}: write `[limits]` and, below it, `user = N` or `project = N`")
    stored |= {f"limits.{key}": value for key, value in limits.items()}
    for key in stored:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, [*known, "limits"], n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The settings are {', '.join(known)}."
            raise SettingsError(f"{file}: {key} is not a setting. {hint}")
    return stored


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises `SettingsError`, which names the invalid setting."""
    home = Path(environ.get("SFTD_HOME") or "~/.sftd").expanduser().absolute()
    file = home / "config.toml"
    fields = [field for field in msgspec.structs.fields(Settings) if field.name != "home"]
    names = {f.name: _NAMES.get(f.name, (f"SFTD_{f.name.upper()}", f.name)) for f in fields}
    stored = _stored(file, [key for _, key in names.values()])
    defaults = {
        "database_url": sqlite_url(home / "sftd.db"),
        "mlflow_tracking_uri": sqlite_url(home / "mlflow.db"),
        "metrics_file": home / "metrics.prom",
    }
    found: dict[str, Any] = {"home": home}
    for field in fields:
        variable, key = names[field.name]
        given = (environ.get(variable), stored.get(key), defaults.get(field.name))
        # An empty value is not set, except that an empty mlflow_tracking_uri turns the mirror off.
        is_set = [v for v in given if v is not None and (v != "" or field.name == "mlflow_tracking_uri")]
        if not is_set:
            continue
        where = f"{variable} (or `{key}` in {file})"
        try:
            prepared = _PREPARED.get(field.name, str)(is_set[0])
            found[field.name] = msgspec.convert(prepared, field.type, strict=False)
        except msgspec.ValidationError:
            raise SettingsError(f"{where}: {str(is_set[0])!r} is {_wrong(field.type)}") from None
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
    return Settings(**found)


def _wrong(kind: Any) -> str:
    """The error text for a value that does not fit a field's type."""
    for part in (kind, *get_args(kind)):
        for meta in getattr(part, "__metadata__", ()):
            return f"not {meta.description}"
    return f"neither {' nor '.join(get_args(kind))}"
