"""Every path of an attempt, and the small files in it. One owner: nobody else joins paths under an attempt.

<attempt>/order.json     what to do (written by the launcher before the start, never changed)
          journal        the trainer's events, one JSON object a line, append-only
          lease          token of the daemon that may drive this attempt; replaced on adoption
          secrets.json   digests of the secrets in the environment of the ranks, which are kept out of the log by them
          process.json   pid and create time of torchrun's session leader
          exit           exit code of torchrun, written when it ends
          stop           present when the trainer shall checkpoint at the next step boundary and end
          output.log     what torchrun printed (and the ranks, where they are not redirected)
          ranks/         torchrun's own folder: what each rank printed, and its error file
          stacks/        where each rank was when the attempt was found to hang
          rows/          decoded data, until every rank has mapped it
          rendezvous     torchrun's own notes
          port           where on the loopback device the ranks meet
          alive          locked by torchrun for as long as it lives, which also shows where its pid does not

Of an attempt that a resource manager runs there are also:
          job.sh         the job's script
          started/       made by the one job that may run the attempt; `job` in it names that job
          told           why the resource manager had the job end: the signal that it sent
          fence          present once the daemon has given the attempt up: ranks that still run may write nothing more
          stacks/wanted  present when the ranks shall write down where they are
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.log.events import Micros
from sftd.domain.model.files import ModelFiles
from sftd.domain.spec.spec import OrderStart, Spec
from sftd.wire.attempt.secrets import Secrets


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt shall do. `checkpoint` is the folder to resume from, `checkpoint_digest` its manifest's sha256;
    None starts from the pretrained model. `train_digest` and `val_digest` are those of the data files as submitted
    (`dataset.files_digest`); empty ones are not checked. `token` names the lease under which the attempt was launched.
    `model_files` is the record of the model folder, None where an older sftd submitted the run, and `weights` the digests of
    its weights (`WeightsDigested`), empty where none were loaded yet: an attempt that finds another folder does not train.
    A copy of the folder's small files is kept below `model_root` (`model_copy`), empty for nowhere.
    `order_start` says which samples the steps read, `losses` are those of the last steps before, oldest first.

    With `last_step` recorded steps are trained again for comparison: up to that one and nothing else, neither validations
    nor checkpoints, from data that may have changed. `order_later` are the pieces of the order of samples that begin at
    later steps. `template` is the chat template of the training data, for exports and answers; an attempt has the data."""

    run_id: str
    attempt: int
    token: str
    spec: Spec
    planned_steps: int
    checkpoint_dir: str
    checkpoint: str | None = None
    checkpoint_digest: str | None = None
    train_digest: str = ""
    val_digest: str = ""
    model_files: ModelFiles | None = None
    weights: dict[str, str] = {}
    model_root: str = ""
    order_start: OrderStart = OrderStart()
    losses: list[float] = []
    last_step: int | None = None
    order_later: list[OrderStart] = []
    template: ChatTemplate | None = None

    def sample_position(self, step: int) -> int:
        """Position in the order of samples of the first sample of 0-based `step`."""
        begun = (piece for piece in reversed(self.order_later) if piece.step <= step)
        return next(begun, self.order_start).position(step, self.spec.data.train_batch_size)


class ProcessFile(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of the attempt's process: a pid alone may be reused, pid and create time (s since the epoch) may not.
    `devices` are those it was given. A run made directly, without a daemon that records the launch, has more:
    `argv`, and `started_at`, when the attempt began. Of one that a resource manager runs `job` is the job's number, empty until it is
    known; `pid` is 0, and `create_time` when it was handed over."""

    pid: int
    create_time: float
    host: str
    devices: list[str] = []
    argv: list[str] = []
    started_at: Micros = 0
    job: str = ""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader sees the old or the new, never a part; mode 0600; survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # Writes all of it, or raises: a full disk may take a part.
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.rename(path)
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """Make a folder and its missing parents, mode 0700 (`Path.mkdir` gives the parents the usual mode), as `make_durable`."""
    make_durable(path, 0o700)


def make_durable(path: Path, mode: int = 0o777) -> None:
    """Make a folder and its missing parents, whose names survive a power cut: what is synced below a name that does not is
    lost with it. Raises `OSError`."""
    for folder in reversed([f for f in (path, *path.parents) if not f.exists()]):
        folder.mkdir(mode=mode, exist_ok=True)
        fsync_dir(folder.parent)
    # Raises where it is a file.
    path.mkdir(exist_ok=True)


def read_order(path: Path) -> Order:
    """Read an order.json. Raises `OSError`."""
    return msgspec.json.decode(path.read_bytes(), type=Order)


class AttemptDir:
    """The folder of one attempt."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.order_file = self.path / "order.json"
        self.journal = self.path / "journal"
        self.lease_file = self.path / "lease"
        self.secrets_file = self.path / "secrets.json"
        self.process_file = self.path / "process.json"
        self.exit_file = self.path / "exit"
        self.stop_file = self.path / "stop"
        self.output_log = self.path / "output.log"
        self.ranks_dir = self.path / "ranks"
        self.stacks_dir = self.path / "stacks"
        self.rows_dir = self.path / "rows"
        self.rendezvous_file = self.path / "rendezvous"
        self.port_file = self.path / "port"
        self.alive_file = self.path / "alive"
        self.script_file = self.path / "job.sh"
        self.started_dir = self.path / "started"
        self.started_job_file = self.started_dir / "job"
        self.told_file = self.path / "told"
        self.fence_file = self.path / "fence"
        self.stacks_wanted_file = self.stacks_dir / "wanted"

    def create(self, order: Order, environ: Mapping[str, str] = os.environ) -> None:
        """Make the folder (mode 0700) and write the order, the lease, and what must not be told of the ranks' environment."""
        make_private(self.ranks_dir)
        write_atomic(self.secrets_file, msgspec.json.encode(Secrets.of(environ)))
        write_atomic(self.lease_file, order.token.encode())
        write_atomic(self.order_file, msgspec.json.format(msgspec.json.encode(order), indent=2))

    def set_aside(self) -> None:
        """Give the folder another name if there is one: it is of another history, and its journal no part of this one."""
        number = 1
        while self.path.exists():
            aside = self.path.with_name(f"{self.path.name}.{number}")
            if not aside.exists():
                self.path.rename(aside)
            number += 1

    def order(self) -> Order:
        """Read the order."""
        return read_order(self.order_file)

    def lease(self) -> str | None:
        """Token of the daemon that drives this attempt, or None when there is none."""
        try:
            return self.lease_file.read_text()
        except FileNotFoundError:
            return None

    def write_lease(self, token: str) -> None:
        """Hand the attempt to the holder of `token`."""
        write_atomic(self.lease_file, token.encode())

    def process(self) -> ProcessFile | None:
        """Identity of the attempt's process, or None when it was never started."""
        try:
            return msgspec.json.decode(self.process_file.read_bytes(), type=ProcessFile)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def write_process(self, process: ProcessFile) -> None:
        """Record the identity of the attempt's process."""
        write_atomic(self.process_file, msgspec.json.encode(process))

    def hold_alive(self) -> int | None:
        """Lock the file `alive` and return its descriptor: what inherits it holds the lock for as long as it lives. None where
        the file system has no locks."""
        fd = os.open(self.alive_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            self.alive_file.unlink()
            return None
        return fd

    def is_held_alive(self) -> bool | None:
        """Whether torchrun lives, on whatever host or in whatever container of this file system; None when nobody can say."""
        try:
            fd = os.open(self.alive_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def exit_code(self) -> int | None:
        """torchrun's exit code, or None when it has not ended (or ended without being able to say so)."""
        try:
            return int(self.exit_file.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write_exit_code(self, code: int) -> None:
        """Record how the attempt ended, where no shell round torchrun does."""
        write_atomic(self.exit_file, f"{code}\n".encode())

    def rank_outputs(self) -> list[tuple[int, Path]]:
        """What each rank printed: (rank, file), its stdout before its stderr. torchrun makes them when the ranks start."""
        found = ((path, path.parent.name) for path in self.ranks_dir.glob("*/attempt_*/*/std*.log"))
        return sorted(
            ((int(rank), path) for path, rank in found if rank.isdecimal()),
            key=lambda item: (item[0], item[1].parent, item[1].name != "stdout.log"),
        )

    def write_rank_error(self, local_rank: int, error: str) -> None:
        """Record why a rank failed, as JSON in torchelastic's form, where torchrun's own folder is elsewhere."""
        folder = self.ranks_dir / "direct" / "attempt_0" / str(local_rank)
        make_private(folder)
        write_atomic(folder / "error.json", error.encode())

    def stack_file(self, rank: int) -> Path:
        """Where a rank writes its stack when it is asked to (`process.leave_stack_on_request`)."""
        return self.stacks_dir / f"rank-{rank}"

    def request_stop(self) -> None:
        """Ask the trainer to checkpoint at the next step boundary and end."""
        self.stop_file.touch(mode=0o600)

    def stop_requested(self) -> bool:
        """Whether the trainer was asked to end."""
        return self.stop_file.exists()

    def started_job(self) -> str:
        """The job that has begun to run the attempt, empty when none has said so."""
        return _read_line(self.started_job_file)

    def told(self) -> str:
        """The signal by which the resource manager announced the job's end, empty when it did not."""
        return _read_line(self.told_file)

    def fence(self) -> None:
        """Have nobody begin, or go on with, this attempt from now on."""
        self.fence_file.touch(mode=0o600)

    def is_fenced(self) -> bool:
        """Whether the daemon has given this attempt up."""
        return self.fence_file.exists()

    def ask_for_stacks(self) -> None:
        """Have the ranks write their stacks, where no signal reaches them."""
        make_private(self.stacks_dir)
        self.stacks_wanted_file.touch(mode=0o600)


def _read_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def attempt_dir(run: Path, number: int) -> AttemptDir:
    """Folder of attempt `number` (from 1) in a run's folder."""
    return AttemptDir(run / f"attempt-{number:04d}")


def model_copy(root: Path, files: ModelFiles) -> Path:
    """Where the small files of a model folder are kept, once for all runs with the same: `root` is the home, or the folder
    of a run that is trained without a daemon."""
    return root / "models" / files.digest


class RunDir:
    """The folder of one run: its attempts and, unless the spec says otherwise, its checkpoints."""

    def __init__(self, home: str | os.PathLike[str], run_id: str) -> None:
        self.path = Path(home) / "runs" / run_id

    def attempt(self, number: int) -> AttemptDir:
        """Folder of attempt `number` (from 1)."""
        return attempt_dir(self.path, number)

    def checkpoint_dir(self, save_dir: str) -> Path:
        """Folder of the run's checkpoints; a run never shares one with another."""
        return Path(save_dir) / self.path.name if save_dir else self.path / "checkpoints"
