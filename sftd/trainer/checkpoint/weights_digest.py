"""Digests of the weight files, computed during the load. The ranks of a host share the work."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftd.domain.log.events import WeightsDigested
from sftd.trainer.errors import UserError
from sftd.wire.cores import usable_cores
from sftd.wire.model.digest import fork_fix, weight_files

_PIECE = 1 << 26
_BLOCK = 1 << 20
_MAX_THREADS = 8
# A file and an offset in it.
_Piece = tuple[str, int]


class WeightsDigest:
    """Starts hashing this rank's share of a model folder's weights in the background.

    The load reads the same pages, so the disk is read once.
    """

    def __init__(self, folder: str, *, is_cpu: bool) -> None:
        """`is_cpu`: the model runs on the CPU, so use a single thread. Raises `UserError` when a file is missing."""
        self._began = time.perf_counter()
        self._seconds = 0.0
        self._folder = Path(folder)
        try:
            self._sizes = {name: (self._folder / name).stat().st_size for name in weight_files(self._folder)}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the weights in {folder} cannot be read: {error}") from error
        pieces = [(name, at) for name, size in self._sizes.items() for at in range(0, size, _PIECE)]
        rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        self._todo: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        for piece in pieces[rank::ranks]:
            self._todo.put(piece)
        self._found: dict[_Piece, bytes] = {}
        self._error = ""
        cores = usable_cores() // ranks
        count = 1 if is_cpu else max(1, min(_MAX_THREADS, cores // 2))
        # Daemon threads: a failing rank exits without waiting for them.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        block = memoryview(bytearray(_BLOCK))
        try:
            while True:
                name, at = piece = self._todo.get_nowait()
                digest = hashlib.sha256()
                with open(self._folder / name, "rb", buffering=0) as file:
                    file.seek(at)
                    left = min(_PIECE, self._sizes[name] - at)
                    while left and (count := file.readinto(block[: min(left, _BLOCK)])):
                        digest.update(block[:count])
                        left -= count
                self._found[piece] = digest.digest()
        except queue.Empty:
            self._seconds = time.perf_counter() - self._began
        except OSError as error:
            self._error = str(error)

    def finish(
        self, gather: Callable[[Any], list[Any]], recorded: dict[str, str], run_id: str
    ) -> WeightsDigested:
        """Combine the digests of all ranks. Collective. `gather` returns every rank's value; `recorded` holds the digests
        in the log, empty if there are none.

        Raises on every rank: `UserError` when the weights differ from the recorded ones or between hosts, `OSError`
        when they cannot be read.
        """
        for thread in self._threads:
            thread.join()
        host = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])
        shares = gather((host, self._sizes, self._found, self._error, self._seconds))
        if errors := [error for _, _, _, error, _ in shares if error]:
            raise OSError(f"the weights cannot be read: {errors[0]}")
        hosts: dict[int, dict[_Piece, bytes]] = {}
        for first, _, found, _, _ in shares:
            hosts.setdefault(first, {}).update(found)
        sizes = {first: of_host for first, of_host, _, _, _ in shares}
        digests = [_combined(sizes[first], found) for first, found in hosts.items()]
        for other in digests[1:]:
            if names := _unlike(digests[0], other):
                raise UserError(f"the hosts hold different weights in {self._folder}: {', '.join(names)}")
        if recorded and (names := _unlike(recorded, digests[0])):
            raise UserError(
                f"{self._folder} changed since the run's first attempt (fix: {fork_fix(run_id, weights=True)}): "
                f"{', '.join(names)} holds other weights"
            )
        return WeightsDigested(
            files=digests[0], bytes=sum(self._sizes.values()), seconds=max(share[-1] for share in shares)
        )


def _combined(sizes: dict[str, int], found: dict[_Piece, bytes]) -> dict[str, str]:
    """File → sha256 of its size and the digests of its pieces."""
    digests = {name: hashlib.sha256(size.to_bytes(8, "little")) for name, size in sizes.items()}
    for name, at in sorted(found):
        digests[name].update(found[name, at])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _unlike(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
