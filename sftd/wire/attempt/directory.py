"""Every path of an attempt, and the small files in it. No other module joins paths under an attempt.

<attempt>/order.json     the order (the launcher writes it before the start; it never changes)
          journal        the trainer's events, one JSON object per line, append-only
          lease          token of the daemon that may drive this attempt; replaced on adoption
          secrets.json   digests of the secrets in the ranks' environment, used to keep the secrets out of the log
          process.json   pid and create time of torchrun's session leader
          exit           exit code of torchrun, written when it ends
          stop           present when the trainer must checkpoint at the next step boundary and end
          output.log     the output of torchrun (and of the ranks, unless redirected)
          ranks/         torchrun's own folder: the output and the error file of each rank
          stacks/        the stack of each rank when the attempt was found to hang
          rows/          decoded data, until every rank has mapped it
          rendezvous     torchrun's rendezvous data
          port           the loopback port of the ranks' rendezvous
          alive          torchrun locks it while it runs; visible on hosts and in containers that cannot see its pid

An attempt that a resource manager runs also has:
          job.sh         the job's script
          started/       made by the one job that may run the attempt; `job` in it names that job
          told           the signal by which the resource manager ended the job
          fence          present when the daemon has abandoned the attempt: ranks that still run must stop writing
          stacks/wanted  present when the ranks must write their stacks
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.data.mixture import MixtureStart
from sftd.domain.log.events import Micros
from sftd.domain.model.files import ModelFiles
from sftd.domain.run.early_stop import Patience
from sftd.domain.spec.spec import OrderStart, Spec
from sftd.wire.attempt.secrets import Secrets


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """The work of an attempt. `checkpoint` is the folder to resume from, `checkpoint_digest` its manifest's sha256;
    None starts from the pretrained model. `train_digest` and `val_digest` are the digests of the data files at submit
    (`dataset.files_digest`); empty ones are not checked. `token` names the lease under which the attempt was launched.
    `model_files` is the record of the model folder, None if an older sftd submitted the run. `weights` are the digests of
    its weights (`WeightsDigested`), empty if no attempt has loaded them yet. An attempt does not train if its folder differs.
    A copy of the folder's small files is kept below `model_root` (`model_copy`); if that is empty, no copy is kept.
    `order_start` defines which samples the steps read, `mixture` where a fork's mixture of sources begins. `losses` are the losses of the preceding steps, oldest first.
    `patience` is that of early stopping by the validation loss, after the preceding validations.

    With `last_step`, the attempt trains recorded steps again for comparison, up to that step, without validations or
    checkpoints; the data may have changed. `order_later` are the pieces of the sample order that begin at later steps.
    `template` is the chat template of the training data, for exports and answers; an attempt reads it from the data."""

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
    mixture: MixtureStart = MixtureStart()
    losses: list[float] = []
    patience: Patience = Patience()
    last_step: int | None = None
    order_later: list[OrderStart] = []
    template: ChatTemplate | None = None

    def sample_position(self, step: int) -> int:
        """Position of the first sample of 0-based `step` in the sample order."""
        begun = (piece for piece in reversed(self.order_later) if piece.step <= step)
        return next(begun, self.order_start).position(step, self.spec.data.train_batch_size)


class ProcessFile(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of the attempt's process. A pid may be reused; the pair of pid and create time (s since the epoch) is unique.
    `devices` are the devices assigned to it. A run trained directly, whose launch no daemon records, also has `argv` and
    `started_at`, the start of the attempt. If a resource manager runs the attempt, `job` is the job's number, empty until
    known; `pid` is 0, and `create_time` is the time of its submission."""

    pid: int
    create_time: float
    host: str
    devices: list[str] = []
    argv: list[str] = []
    started_at: Micros = 0
    job: str = ""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data`, atomically and durably; mode 0600. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # A file object writes everything or raises; `os.write` may write only a part to a full disk.
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
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """`make_durable` with mode 0700, also for the parents (`Path.mkdir` gives parents the default mode)."""
    make_durable(path, 0o700)


def make_durable(path: Path, mode: int = 0o777) -> None:
    """Make a folder and its missing parents, durably: synced files are lost if the name of a folder above them is lost.
    Raises `OSError`."""
    for folder in reversed([f for f in (path, *path.parents) if not f.exists()]):
        folder.mkdir(mode=mode, exist_ok=True)
        fsync_dir(folder.parent)
    # Raises if `path` is a file.
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
        """Make the folder (mode 0700) and write the order, the lease and the digests of the secrets in `environ`."""
        make_private(self.ranks_dir)
        write_atomic(self.secrets_file, msgspec.json.encode(Secrets.of(environ)))
        write_atomic(self.lease_file, order.token.encode())
        write_atomic(self.order_file, msgspec.json.format(msgspec.json.encode(order), indent=2))

    def set_aside(self) -> None:
        """Rename the folder if it exists: it belongs to another history, and its journal must not be read as part of this one."""
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
        """Token of the daemon that drives this attempt, or None."""
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
        """Lock the file `alive` and return its descriptor. A process that inherits the descriptor holds the lock until it
        ends. Returns None if the file system does not support locks."""
        fd = os.open(self.alive_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            self.alive_file.unlink()
            return None
        return fd

    def is_held_alive(self) -> bool | None:
        """Whether torchrun runs, on any host or in any container that shares this file system; None if unknown."""
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
        """torchrun's exit code, or None when it has not ended or ended without writing one."""
        try:
            return int(self.exit_file.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def write_exit_code(self, code: int) -> None:
        """Record the exit code, for launches without the shell wrapper that writes it."""
        write_atomic(self.exit_file, f"{code}\n".encode())

    def rank_outputs(self) -> list[tuple[int, Path]]:
        """(rank, file) of the output of each rank, stdout before stderr. torchrun makes the files when the ranks start."""
        found = ((path, path.parent.name) for path in self.ranks_dir.glob("*/attempt_*/*/std*.log"))
        return sorted(
            ((int(rank), path) for path, rank in found if rank.isdecimal()),
            key=lambda item: (item[0], item[1].parent, item[1].name != "stdout.log"),
        )

    def write_rank_error(self, local_rank: int, error: str) -> None:
        """Record the error of a rank, JSON in torchelastic's format, if torchrun's own folder is elsewhere."""
        folder = self.ranks_dir / "direct" / "attempt_0" / str(local_rank)
        make_private(folder)
        write_atomic(folder / "error.json", error.encode())

    def stack_file(self, rank: int) -> Path:
        """The file to which a rank writes its stack on request (`process.leave_stack_on_request`)."""
        return self.stacks_dir / f"rank-{rank}"

    def request_stop(self) -> None:
        """Request that the trainer checkpoint at the next step boundary and end."""
        self.stop_file.touch(mode=0o600)

    def stop_requested(self) -> bool:
        """Whether a stop was requested."""
        return self.stop_file.exists()

    def started_job(self) -> str:
        """The job that has started the attempt, empty when none is recorded."""
        return _read_line(self.started_job_file)

    def told(self) -> str:
        """The signal by which the resource manager announced the job's end, empty if it sent none."""
        return _read_line(self.told_file)

    def fence(self) -> None:
        """Keep every process from starting or continuing this attempt."""
        self.fence_file.touch(mode=0o600)

    def is_fenced(self) -> bool:
        """Whether the daemon has abandoned this attempt."""
        return self.fence_file.exists()

    def ask_for_stacks(self) -> None:
        """Request the ranks' stacks through a file, for ranks that no signal from here reaches."""
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
    """The copy of a model folder's small files; runs with equal files share it. `root` is the home, or the folder of a run
    trained without a daemon."""
    return root / "models" / files.digest


class RunDir:
    """The folder of one run: its attempts and, without `checkpoint.save_dir`, its checkpoints."""

    def __init__(self, home: str | os.PathLike[str], run_id: str) -> None:
        self.path = Path(home) / "runs" / run_id

    def attempt(self, number: int) -> AttemptDir:
        """Folder of attempt `number` (from 1)."""
        return attempt_dir(self.path, number)

    def evaluation(self, name: str, step: int) -> Path:
        """Folder of the evaluation `name` of the checkpoint of `step`: its order, output and answers."""
        return self.path / "evaluations" / name / f"step-{step:08d}"

    def checkpoint_dir(self, save_dir: str) -> Path:
        """Folder of the run's checkpoints. Runs never share one."""
        return Path(save_dir) / self.path.name if save_dir else self.path / "checkpoints"
