"""Real runs under real daemons, and faults at seeded random moments. `chaos_check` says what must hold afterwards.

Runs of the configurations of `chaos_runs` go through one daemon (SQLite) or several with a home each (PostgreSQL), and
whatever can be killed, frozen, filled up or set wrong is, one fault after another. There are always some runs in the queue;
once all faults are injected it is let go empty.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import sqlalchemy as sa

from sftd.domain.run.state import ENDED
from sftd.operations.queries.runs import list_runs
from sftd.settings import full_database_url
from sftd.store.database.engine import Store, open_engine
from sftd.store.queue import leases
from tests.builders.chaos import chaos_check
from tests.builders.chaos.chaos_check import Reference, Tally, Touch
from tests.builders.chaos.chaos_hosts import (
    POLL,
    SKEW,
    Living,
    Node,
    has_stepped,
    is_running,
    kill,
    left,
    mount,
    restart_postgres,
    shown_argv,
)
from tests.builders.chaos.chaos_runs import INTERVAL, RUN, STEPS, VARIANTS
from tests.builders.patience import PATIENCE, holds_within
from tests.builders.process.homes import Home

LEASE_SECONDS = 3.0
# As asked; the second when it had hardly begun and did not listen yet.
_STOPPED = (0, -signal.SIGTERM)
_NOTHING_SECONDS = _END_SECONDS = 600.0
_STEP_BYTES = 300
_DISK_MIB = 512


class Chaos:
    """One database, its daemons, and what is done to them. Use it as a context: in the end nothing of it runs."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        reference: Reference,
        *,
        seed: int,
        database_url: str | None = None,
        daemons: int = 1,
        runs: int = 2,
        variants: int = len(VARIANTS),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`database_url` is of an empty PostgreSQL database on this host, which is restarted; without one a SQLite file
        serves, for one daemon. `runs` are in the queue at any time; `say` gets each fault."""
        self._folder = folder
        self._model = model
        self._reference = reference
        self._random = random.Random(seed)
        self._given_url = database_url
        self._count = daemons
        self._runs = runs
        self._variants = variants
        self._say = say
        self._stack = ExitStack()
        self._nodes: list[Node] = []
        self._submitted: dict[str, int] = {}
        self.tally = Tally()

    def __enter__(self) -> Chaos:
        with ExitStack() as stack:
            stack.callback(self._kill_everything)
            skew = self._folder / "skew"
            skew.mkdir(parents=True)
            (skew / "sitecustomize.py").write_text(SKEW)
            self._disk = self._mount(stack)
            url = self._given_url or f"sqlite:///{self._folder}/sftd.db"
            self._store = Store(open_engine(full_database_url(url)))
            stack.callback(self._store.engine.dispose)
            homes = [self._home(number, url, skew) for number in range(self._count)]
            homes[0].run("init")
            self._nodes = [Node(home, home.start_daemon()) for home in homes]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _home(self, number: int, url: str, skew: Path) -> Home:
        folder = self._folder / f"host-{number}"
        folder.mkdir()
        home = Home(folder, self._model)
        paths = [str(skew), os.environ.get("PYTHONPATH", "")]
        home.env |= {
            "SFTD_DATABASE_URL": url,
            "SFTD_CPU_SLOTS": "2" if self._count == 1 else "1",
            "SFTD_LEASE_SECONDS": str(LEASE_SECONDS),
            "SFTD_POLL_SECONDS": "0.1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        return home

    def _mount(self, stack: ExitStack) -> Path | None:
        """A small disk for the checkpoints, or None where this user may not mount one."""
        disk = self._folder / "disk"
        disk.mkdir()
        if refused := mount(disk, _DISK_MIB):
            self.tally.not_injected["fill the disk"] = refused
            return None
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        return disk

    def faults(self) -> dict[str, Callable[[], Touch | None]]:
        """Every fault that can be injected here, by name. One that finds no target gives None."""
        found: dict[str, Callable[[], Touch | None]] = {
            "kill a daemon": self._kill_daemon,
            "kill a daemon and its runs": self._kill_host,
            "kill torchrun's agent": lambda: self._kill(lambda a: [a.agent]),
            "kill a rank": lambda: self._kill(lambda a: [self._random.choice(a.ranks)] if a.ranks else []),
            "kill all of an attempt": lambda: self._kill(lambda a: a.processes),
            "freeze a daemon past its lease": self._freeze_daemon,
            "… and take its run away": self._take_away,
            "freeze a rank": self._freeze_rank,
        }
        if self._disk is not None:
            found["fill the disk"] = self._fill_disk
        if self._given_url is not None:
            found |= {"restart PostgreSQL": self._restart_postgres, "skew a daemon's clock": self._skew}
        return found

    def run(self, count: int, kinds: list[str] | None = None, seconds: float = float("inf")) -> Tally:
        """Inject that number of faults, all kinds equally often, in random order, but none after `seconds`; let the queue run empty, and
        check everything."""
        known = self.faults()
        names = kinds or list(known)
        order = [names[n % len(names)] for n in range(count)]
        self._random.shuffle(order)
        last = time.monotonic() + seconds
        for number, name in enumerate(order, 1):
            if time.monotonic() > last:
                break
            self._top_up()
            self._moment()
            touch = self._inject(known[name])
            if touch is None:
                self.tally.wrong.append(f"fault {number}, {name}: nothing to inject it into")
            else:
                touch.fault = name
                self.tally.touches.append(touch)
            self._say(f"{number}/{count} {name}{touch.shown() if touch else ': no target'}")
            self._look()
        self._end()
        chaos_check.check(self._store, self._submitted, self._reference, self._homes(), self.tally)
        return self.tally

    def _inject(self, fault: Callable[[], Touch | None]) -> Touch | None:
        """A fault, once there is something to inject it into."""
        touched: list[Touch] = []

        def is_injected() -> bool:
            if touch := fault():
                touched.append(touch)
            else:
                self._top_up()
            return bool(touched)

        return touched[0] if holds_within(_NOTHING_SECONDS, is_injected, every=POLL) else None

    def _homes(self) -> list[Home]:
        return [node.home for node in self._nodes]

    def _unfinished(self) -> int:
        return sum(row.status not in ENDED for row in list_runs(self._store))

    def _top_up(self) -> None:
        for _ in range(self._unfinished(), self._runs):
            variant = len(self._submitted) % self._variants
            disk = [f"checkpoint.save_dir={self._disk}"] if self._disk else []
            run_id = self._nodes[0].home.submit(*RUN, *VARIANTS[variant], *disk)
            self._submitted[run_id] = variant

    def _moment(self) -> None:
        """Let a random time pass, or a random number of steps: a start takes seconds, a step milliseconds."""
        if self._random.random() < 0.4:
            # Nothing is waited for: this is the moment of the fault.
            holds_within(self._random.uniform(0, 6), lambda: False)
        else:
            self._steps(self._random.randint(1, STEPS // 2), 15)

    def _steps(self, steps: int, seconds: float) -> None:
        """Wait until the journals have grown by about that number of steps, or until the time is up."""
        target = self._written() + steps * _STEP_BYTES
        holds_within(seconds, lambda: self._written() >= target, every=POLL)

    def _written(self) -> int:
        journals = (j for node in self._nodes for j in (node.home.path / "home").glob("runs/*/*/journal"))
        return sum(journal.stat().st_size for journal in journals)

    def _look(self) -> None:
        """What must hold at any time: no daemon ended by itself, no run is trained twice at once."""
        for node in self._nodes:
            if node.daemon.poll() is not None:
                last = (node.home.path / "daemon.log").read_text().splitlines()[-1:]
                if any("does not answer" in line for line in last):
                    # It was started while the server was not back yet, and says so; what keeps it up starts it again.
                    self.tally.refused_starts += 1
                else:
                    self._blame_daemon(node, "ended by itself")
                node.daemon = node.home.start_daemon()
        seen: dict[str, Living] = {}
        for living in self._all():
            other = seen.setdefault(living.run_id, living)
            if other is not living and all(any(map(is_running, a.processes)) for a in (living, other)):
                self.tally.wrong.append(
                    f"{living.run_id}: attempts {other.number} and {living.number} run at once"
                )

    def _blame_daemon(self, node: Node, what: str) -> None:
        tail = (node.home.path / "daemon.log").read_text()[-2000:]
        self.tally.wrong.append(
            f"{node.home.path.name}: its daemon {what} ({node.daemon.returncode}): {tail}"
        )

    def _all(self) -> list[Living]:
        return [living for node in self._nodes for living in node.living()]

    def _touch(self, *attempts: Living) -> Touch:
        return Touch([(a.run_id, a.number) for a in attempts])

    def _kill_daemon(self) -> Touch:
        node = self._random.choice(self._nodes)
        touch = self._touch(*node.living())
        node.daemon.kill()
        node.daemon.wait()
        node.daemon = node.home.start_daemon()
        return touch

    def _kill_host(self) -> Touch | None:
        node, living = self._driving()
        if node is None:
            return None
        node.daemon.kill()
        kill([p for attempt in living for p in attempt.processes])
        node.daemon.wait()
        # It may have started one more meanwhile.
        late = node.living()
        for attempt in late:
            kill(attempt.processes)
        node.daemon = node.home.start_daemon()
        return self._touch(*living, *late)

    def _kill(self, choose: Callable[[Living], list[psutil.Process | None]]) -> Touch | None:
        attempt = self._pick(self._all())
        victims = [p for p in choose(attempt) if p is not None] if attempt else []
        if attempt is None or not victims:
            return None
        kill(victims)
        return self._touch(attempt)

    def _pick(self, attempts: list[Living]) -> Living | None:
        return self._random.choice(attempts) if attempts else None

    def _driving(self) -> tuple[Node | None, list[Living]]:
        """A daemon that drives something, and what."""
        for node in self._random.sample(self._nodes, len(self._nodes)):
            if living := node.living():
                return node, living
        return None, []

    def _freeze_daemon(self) -> Touch | None:
        node, living = self._driving()
        if node is None:
            return None
        with self._frozen(node):
            pass
        return self._touch(*living)

    @contextlib.contextmanager
    def _frozen(self, node: Node) -> Iterator[None]:
        """Stop a daemon until its leases have ended."""
        node.daemon.send_signal(signal.SIGSTOP)
        # Without a lease of its own there is nothing to wait for.
        try:
            holds_within(2 * LEASE_SECONDS, lambda: not self._all_hold(), every=POLL)
            yield
        finally:
            node.daemon.send_signal(signal.SIGCONT)

    def _all_hold(self) -> bool:
        """Whether no lease has ended: a daemon that is not frozen renews its own every second."""
        with self._store.read() as connection:
            now = self._store.clock(connection, time.time_ns() // 1000)
            oldest = min((lease.expires_at for lease in leases.leases(connection)), default=0)
        return oldest > now

    def _take_away(self) -> Touch | None:
        """What a person does whose host is gone for good: nothing of it runs, so give it up and start it elsewhere."""
        node, living = self._driving()
        if node is None:
            return None
        attempt = self._random.choice(living)
        person = node.home.env | {"PGOPTIONS": "-c lock_timeout=5s"}
        with self._frozen(node):
            kill(attempt.processes)
            for command in (("cancel", attempt.run_id, "--abandon"), ("resume", attempt.run_id)):
                done = subprocess.run(
                    node.home.command(*command), env=person, capture_output=True, text=True, timeout=PATIENCE
                )
                if done.returncode:
                    # It had ended already, or the daemon was frozen in the middle of a transaction.
                    reason = done.stderr.strip().splitlines()[-1:]
                    self._say(f"    sftd {' '.join(command)}: {reason}")
                    break
                self.tally.given_up.add((attempt.run_id, attempt.number))
        return self._touch(attempt)

    def _freeze_rank(self) -> Touch | None:
        # Before its first step an attempt may take 15 minutes: nobody waits for that here.
        attempt = self._pick([a for a in self._all() if a.ranks and has_stepped(a.directory)])
        if attempt is None:
            return None
        self._random.choice(attempt.ranks).suspend()
        return self._touch(attempt)

    def _fill_disk(self) -> Touch | None:
        living = self._all()
        if not living:
            return None
        assert self._disk is not None
        filler = self._disk / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            # Others write meanwhile, so how much is free is not known before it is gone.
            while file.write(bytes(1 << 20)):
                pass
        try:
            self._steps(INTERVAL * 2, 20)
        finally:
            filler.unlink()
        return self._touch(*living)

    def _restart_postgres(self) -> Touch:
        with self._store.read() as connection:
            folder = Path(connection.execute(sa.text("SHOW data_directory")).scalar_one())
        self._store.engine.dispose()
        restart_postgres(folder)
        return self._touch(*self._all())

    def _skew(self) -> Touch:
        node = self._random.choice(self._nodes)
        living = node.living()
        node.daemon.terminate()
        if node.daemon.wait(timeout=PATIENCE) not in _STOPPED:
            self._blame_daemon(node, "did not stop as asked")
        node.home.env["CHAOS_SKEW"] = str(self._random.choice([-7200, -60, 0, 60, 7200]))
        node.daemon = node.home.start_daemon()
        return self._touch(*living)

    def _end(self) -> None:
        """Let the queue run empty, then stop the daemons."""

        def is_moving() -> bool:
            before, written[:] = written[0], [self._written()]
            return written[0] != before or not self._unfinished()

        written = [-1]
        while self._unfinished():
            if not holds_within(_END_SECONDS, is_moving, every=0.1):
                self.tally.wrong.append(
                    f"nothing was written for {_END_SECONDS:.0f} s, and runs are not ended"
                )
                break
        self._look()
        for node in self._nodes:
            node.daemon.terminate()
            if node.daemon.wait(timeout=PATIENCE) not in _STOPPED:
                self._blame_daemon(node, "did not stop as asked")
        self.tally.wrong += [f"pid {p.pid} is left: {shown_argv(p)}" for p in left(self._homes())]

    def _kill_everything(self) -> None:
        kill(left(self._homes()))
        for node in self._nodes:
            node.daemon.wait(timeout=60)
