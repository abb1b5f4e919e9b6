"""What goes wrong in a rank of a warm attempt. Each function runs in every rank before the attempt, and says which it is for.

A fault replaces what the operating system, torch or psutil would do, never a part of the trainer; `experts_together` is no fault.
"""

from __future__ import annotations

import builtins
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.builders.patience import until


def _is(rank: int) -> bool:
    return int(os.environ["RANK"]) == rank


def experts_together() -> None:
    """Compute experts on a CPU as on a GPU, with PyTorch in the place of the kernels."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from sftd.trainer.model.grouped import experts

    group = experts.use_grouped_experts

    def group_all(model: Any) -> None:
        group(model)
        found = [module for module in model.modules() if isinstance(module, SequentialMLP)]
        assert all(isinstance(module, experts.GroupedExperts) for module in found), "some stay one by one"

    vars(experts).update(are_grouped=lambda _device: True, use_grouped_experts=group_all)


def cannot_open(rank: int, path: str, code: str, *, writing: bool, times: int = 10**9) -> None:
    """`rank` cannot open the files whose paths match, for reading or for `writing`, the first `times`."""
    if not _is(rank):
        return
    pattern, left = re.compile(path), [times]

    def refuse(file: Any, is_writing: bool) -> None:
        if (
            is_writing == writing
            and left[0]
            and not isinstance(file, int)
            and pattern.search(os.fspath(file))
        ):
            left[0] -= 1
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number), os.fspath(file))

    plain, low = builtins.open, os.open

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        refuse(file, bool(set(mode) & set("wxa+")))
        return plain(file, mode, *args, **more)

    def opened_low(file: Any, flags: int, *args: Any, **more: Any) -> int:
        refuse(file, bool(flags & (os.O_WRONLY | os.O_RDWR)))
        return low(file, flags, *args, **more)

    vars(builtins)["open"] = opened
    vars(os)["open"] = opened_low


def hold_write(rank: int, path: str, until_exists: str, note: str) -> None:
    """`rank` finishes no file whose path matches before the path `until_exists` exists, or its main thread waits for a
    thread. Which of the two it was goes to the file `note`, a line for each file."""
    if _is(rank):
        _hold(path, lambda: Path(until_exists).exists(), note)


def disk_alters(rank: int, path: str) -> None:
    """What `rank` writes to a file whose path matches is another byte once it is synced."""
    if not _is(rank):
        return
    fsync = os.fsync

    def altering(fd: Any) -> None:
        fsync(fd)
        if re.search(path, name := os.readlink(f"/proc/self/fd/{fd}")):
            with open(name, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))

    vars(os)["fsync"] = altering


def hold_while_training(path: str, journal: str, ahead: int, note: str) -> None:
    """No rank begins a file whose path matches before `ahead` more steps are in the journal, or its main thread waits for a
    thread."""
    seen: dict[str, int] = {}

    def steps() -> int:
        return Path(journal).read_bytes().count(b'"StepCompleted"')

    def is_ahead() -> bool:
        return steps() >= seen.setdefault("first", steps()) + ahead

    plain = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if "x" in mode and re.search(path, os.fspath(file)):
            seen.clear()
            _wait(is_ahead, note)
        return plain(file, mode, *args, **more)

    vars(builtins)["open"] = opened


def _hold(path: str, is_over: Callable[[], bool], note: str) -> None:
    fsync = os.fsync

    def held(fd: Any) -> None:
        if re.search(path, os.readlink(f"/proc/self/fd/{fd}")):
            _wait(is_over, note)
        fsync(fd)

    vars(os)["fsync"] = held


def _wait(is_over: Callable[[], bool], note: str) -> None:
    over: list[str] = []

    def look() -> bool:
        # In this order: what is over was over before the main thread waited.
        if is_over():
            over.append("over")
        elif _main_waits():
            over.append("main waits")
        return bool(over)

    until(look)
    with open(note, "a") as file:
        file.write(over[0] + "\n")


def _main_waits() -> bool:
    """Whether the main thread waits for another thread: not for another rank."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename == threading.__file__:
            return True
        frame = frame.f_back
    return False


def little_memory(rank: int) -> None:
    """The host of `rank` has no memory to spare."""
    if not _is(rank):
        return
    import psutil

    measured = psutil.virtual_memory
    vars(psutil)["virtual_memory"] = lambda: measured()._replace(available=1000)


def draws_numbers() -> None:
    """Each all-reduce draws from both random streams of a rank, as dropout would: from each another number of times."""
    import torch
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    reduce = dist.all_reduce

    def drawing(*args: Any, **more: Any) -> Any:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        if tracker.get_states():
            torch.rand(1 + int(os.environ["RANK"]))
            with tracker.fork():
                torch.rand(3 + int(os.environ["RANK"]))
        return reduce(*args, **more)

    vars(dist)["all_reduce"] = drawing


def is_a_node(rank: int) -> None:
    """`rank` is the first of a node of its own."""
    if _is(rank):
        os.environ["LOCAL_RANK"] = "0"


def waits_at(rank: int, path: str, reached: str, go: str) -> None:
    """`rank` makes the file `reached` before it opens a file whose path matches, and goes no further before `go` exists."""
    if not _is(rank):
        return
    plain = builtins.open

    def opened(file: Any, *args: Any, **more: Any) -> Any:
        if not isinstance(file, int) and re.search(path, os.fspath(file)):
            Path(reached).touch()
            until(Path(go).exists)
        return plain(file, *args, **more)

    vars(builtins)["open"] = opened


def notes_sleep(after: str, note: str) -> None:
    """Each rank makes the file `note` when it sleeps, once the path `after` exists."""
    sleep = time.sleep

    def noted(seconds: float) -> None:
        if Path(after).exists():
            Path(note).touch()
        sleep(seconds)

    vars(time)["sleep"] = noted
