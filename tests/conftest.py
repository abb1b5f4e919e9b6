"""The databases that tests run on: SQLite in a temporary file, and a real PostgreSQL that lives as long as the session."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.builders import postgres
from tests.builders import warm_python as warm_start
from tests.builders.patience import HUNG

# Imported where they are used: machines of tests/gpu need no packages of databases.
if TYPE_CHECKING:
    import sqlalchemy as sa

    from sftd.store.database.engine import Store

# CI judges the change at hand and not the luck of a draw; a developer's runs look for new cases.
# No deadlines: how long an example takes says how busy the machine is.
# A busy machine is slow at drawing examples, too.
_PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("local", **_PATIENT)
hypothesis.settings.register_profile("ci", derandomize=True, **_PATIENT)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# What of a user's environment, of CI's or of a cluster's job would be heard by what is tested.
_HEARD = tuple(
    "SFTD_ MLFLOW_ PG SLURM_ SBATCH_ SQUEUE_ TORCHELASTIC_ PET_ RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ "
    "COLUMNS LINES NO_COLOR FORCE_COLOR CLICOLOR HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy".split()
)
# Said to the tests themselves.
_SAID_TO_US = ("SFTD_TEST_MODEL", "SFTD_SCREENSHOT")
for _name in [n for n in os.environ if n.startswith(_HEARD) and n not in _SAID_TO_US]:
    del os.environ[_name]
# Every process that a test starts finds the package, in a plain checkout without an installation, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# What is started in the background of a script ignores Ctrl-C, under nohup it ignores SIGHUP, and so would all that it
# starts.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    *((number, signal.SIG_DFL) for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP)),
):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


# A pure test that takes so long hangs; one that waits for other programs has pytest's own limit.
_PURE = [Path(__file__).with_name(name) for name in ("unit", "architecture")]
_PURE_SECONDS = 300


# What takes long starts first: a worker that begins a long file last keeps the others waiting. Slurm's tests take minutes and
# use little of a core. pytest itself sorts files by name, whatever the order of its arguments.
_FIRST = ("process/launcher/test_slurm.py", "process/", "trainer/")


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    return next((n for n, start in enumerate(_FIRST) if path.startswith(start)), len(_FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files. A pure test gets its own limit unless it asks for another."""
    items.sort(key=_place)
    for item in items:
        if _PURE[0] in item.path.parents or _PURE[1] in item.path.parents:
            item.add_marker(pytest.mark.timeout(_PURE_SECONDS), append=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the stacks of attempts that hung under a warm Python and then ended under a cold one."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (factory := getattr(config, "_tmp_path_factory", None)):
        for file in sorted(factory.getbasetemp().glob(f"{HUNG}*.txt")):
            terminalreporter.section(f"{file.name}: hung, and was started again", red=True)
            terminalreporter.write_line(file.read_text())


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Have a folder that all processes of this pytest share filled by the first that asks for it: `made_once(name, fill)`. Who
    gets it changes nothing in it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = shared / f"shared-{name}"
        with open(shared / f"shared-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                begun = folder.with_name(f"{folder.name}.begun")
                shutil.rmtree(begun, ignore_errors=True)
                begun.mkdir()
                fill(begun)
                begun.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """What WARM must be in the environment of processes whose torchrun, ranks and tools are to start without imports."""
    with warm_start.serving() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sa.URL]:
    """URL of a PostgreSQL server of our own, on a Unix socket."""
    import sqlalchemy as sa

    # Not pytest's tmp_path: a socket's path may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="sftd-pg-")
    try:
        with postgres.server(folder) as server:
            url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
            # Nothing here outlives the session, so nothing need survive a power cut; copying a database is ten times as fast.
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                _run_sql(url, f"ALTER SYSTEM SET {setting} = off")
            _run_sql(url, "SELECT pg_reload_conf()")
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_sql(url: sa.URL, statement: str) -> None:
    import sqlalchemy as sa

    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


@pytest.fixture(scope="session")
def postgres_template(postgres_server: sa.URL) -> str:
    """Name of a database with migrated tables, to be copied."""
    from sftd.store.database.engine import open_engine
    from sftd.store.database.migrate import upgrade

    _run_sql(postgres_server, "CREATE DATABASE sftd_template")
    engine = open_engine(_text(postgres_server.set(database="sftd_template")))
    upgrade(engine)
    engine.dispose()
    return "sftd_template"


def _text(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with migrated tables, to be copied."""
    from sftd.store.database.engine import open_engine
    from sftd.store.database.migrate import upgrade

    path = tmp_path_factory.mktemp("template") / "sftd.db"
    engine = open_engine(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    return path


def _database(request: pytest.FixtureRequest, tmp_path: Path, *, migrated: bool) -> Iterator[str]:
    if request.param == "sqlite":
        path = tmp_path / ("sftd.db" if migrated else "empty.db")
        if migrated:
            shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: sa.URL = request.getfixturevalue("postgres_server")
    template = request.getfixturevalue("postgres_template") if migrated else "template1"
    name = f"t_{uuid.uuid4().hex}"
    _run_sql(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _text(server.set(database=name))
    _run_sql(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without tables."""
    yield from _database(request, tmp_path, migrated=False)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database with the migrated tables and nothing in them."""
    yield from _database(request, tmp_path, migrated=True)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def shared_database_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a database with the migrated tables, for all tests of a module."""
    yield from _database(request, tmp_path_factory.mktemp("database"), migrated=True)


@pytest.fixture
def empty_engine(empty_database_url: str) -> Iterator[sa.Engine]:
    """An engine on a database without tables."""
    from sftd.store.database.engine import open_engine

    engine = open_engine(empty_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A store with the migrated tables and nothing in them, without views."""
    from sftd.store.database.engine import Store, open_engine

    engine = open_engine(database_url)
    yield Store(engine)
    engine.dispose()


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Settings as on a fresh machine: nothing of the developer's own SFTD_* or MLflow settings is seen."""
    for name in [n for n in os.environ if n.startswith(("SFTD_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SFTD_HOME", str(tmp_path / "home"))
    return {"home": tmp_path / "home"}
