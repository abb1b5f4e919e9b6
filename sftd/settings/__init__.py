"""The environment of the control plane, read once. A value comes from the environment, else from `SFTD_HOME/config.toml`, else
it has the default written here."""

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

# What a person can be notified of; `domain/notices.py` says which events that is.
NOTIFY_KINDS = ("ended", "failed", "anomaly", "started", "retrying", "paused")
# Beginnings of the variables that may hold secrets and that no trainer needs.
WITHHELD = ("SFTD_DATABASE_URL", "MLFLOW_TRACKING_", "SFTD_NOTIFY_")

# A description continues "'x' is not".
Positive = Annotated[float, Meta(gt=0, lt=1e300, description="a number above 0")]
Count = Annotated[int, Meta(ge=1, description="a whole number above 0")]
Devices = Annotated[int, Meta(ge=1, description="a number of devices above 0")]


class SettingsError(Exception):
    """A setting cannot be used."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`home`: all state. `database_url`: SQLAlchemy's form. `mlflow_tracking_uri`: MLflow's form; empty turns the mirror
    off. `cpu_slots`: CPU cores that runs may use on a host without GPUs; None is all of them. Times are seconds.
    `metrics_file`: what the daemon writes for Prometheus. `user_limit`, `project_limit`: devices that the runs
    of one user or project may have at once; None is no limit. `device_price`: what a device costs an hour, None
    unknown. `notify_command` and `notify_webhook` get what `notify_on` names; empty is none. `sample_seconds`:
    how often an attempt's host is sampled. `slurm_jobs`: jobs that the daemon has on Slurm at once;
    `slurm_poll_seconds`: how often it asks the controller about all of them."""

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
        # Others may hold secrets.
        return f"Settings(home={str(self.home)!r})"

    @property
    def lease_micros(self) -> int:
        """How many µs a lease lasts unless it is renewed."""
        return int(self.lease_seconds * 1_000_000)

    @property
    def silent_micros(self) -> int:
        """A daemon that has not renewed its row for this many µs is not observed. Daemons renew it three times in a lease."""
        return 2 * self.lease_micros

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


def _command(text: str) -> str:
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{error}: it is split as a shell would, but run without one") from None
    return text if argv else ""


def _webhook(given: str) -> str:
    """The URL, which no message quotes: it is a secret."""
    url = given.strip()
    try:
        parsed = urllib.parse.urlsplit(url)
        usable = parsed.scheme in ("http", "https") and parsed.hostname and (parsed.port or True)
    except ValueError:
        usable = False
    if url and (not usable or any(not "!" <= letter <= "~" for letter in url)):
        raise ValueError("it is not a URL such as https://host/path")
    if url and "@" in parsed.netloc:
        raise ValueError("a user and a password in the URL are not sent; put a token into its path")
    return url


def _kinds(value: object) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    kinds = [str(name).strip() for name in names if str(name).strip()]
    if unknown := [kind for kind in kinds if kind not in NOTIFY_KINDS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(NOTIFY_KINDS)}")
    if not kinds:
        raise ValueError(f"it names nothing; name some of {', '.join(NOTIFY_KINDS)}")
    return kinds


# What is done to a value before its type is checked. A ValueError is the end of the message.
_PREPARED: dict[str, Callable[[Any], object]] = {
    "database_url": lambda url: full_database_url(str(url)),
    "mlflow_tracking_uri": lambda url: _absolute_sqlite(str(url)),
    "metrics_file": lambda file: Path(str(file)).expanduser().absolute(),
    "notify_command": lambda text: _command(str(text)),
    "notify_webhook": lambda url: _webhook(str(url)),
    "notify_on": _kinds,
}
# (variable, key of config.toml) where they are not SFTD_ and the name, and the name.
_NAMES = {
    "mlflow_tracking_uri": ("MLFLOW_TRACKING_URI", "mlflow_tracking_uri"),
    "user_limit": ("SFTD_LIMIT_USER", "limits.user"),
    "project_limit": ("SFTD_LIMIT_PROJECT", "limits.project"),
}


def _stored(file: Path, known: list[str]) -> dict[str, object]:
    """The keys of config.toml; those of a table with its name before them. A misspelt limit would limit nobody."""
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
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise SettingsError(f"{file}: {key} is no setting. {hint}")
    return stored


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings. Raises `SettingsError` naming the setting that cannot be used."""
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
        # Empty is not set, but an empty address turns the mirror off.
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
    """What a value is that does not fit a field's type."""
    for part in (kind, *get_args(kind)):
        for meta in getattr(part, "__metadata__", ()):
            return f"not {meta.description}"
    return f"neither {' nor '.join(get_args(kind))}"
