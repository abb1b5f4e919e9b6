"""Tokenises pieces in several processes and returns the results in the order of the pieces."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.prepare.sources.chat_files import Piece
from sftd.trainer.tools.prepare.tokenize_pieces import Done, PieceTokenizer, TokenizeOptions
from sftd.wire.cores import usable_cores

# Pieces in flight per worker. Bounds the memory, whatever the size of the files.
_AHEAD = 3
# Imported once, by the fork server.
_WITHOUT_TORCH = "sftd.trainer.chat.without_torch"
_PRELOAD = ["transformers.models.auto.tokenization_auto", __name__]


def default_workers(size: int) -> int:
    """One worker per core, but at most one per 8 MB: with less data, starting them would take longer than the work."""
    return max(1, min(usable_cores(), 32, size // (8 << 20)))


def tokenized(
    pieces: Iterable[Piece], own: PieceTokenizer, model: Path, options: TokenizeOptions, workers: int
) -> Iterator[Done]:
    """Each piece's result, in order. With one worker it is `own`, in this process."""
    if workers == 1:
        yield from map(own, pieces)
        return
    context = multiprocessing.get_context("forkserver")
    blocked = [_WITHOUT_TORCH] if _WITHOUT_TORCH in sys.modules else []
    context.set_forkserver_preload([*blocked, *_PRELOAD])
    pool = ProcessPoolExecutor(workers, context, _start, (model, options))
    waiting: deque[Future[Done]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_tokenize, piece))
            if len(waiting) == workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise PrepareError(
            "A worker process ended unexpectedly, perhaps because memory ran out. Use fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_own: Callable[[Piece], Done]


def _start(model: Path, options: TokenizeOptions) -> None:
    """Initialise this process as a worker."""
    global _own  # noqa: PLW0603  a pool's worker has no other place for state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _own = PieceTokenizer(model, options)


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    with contextlib.suppress(OSError):
        parent.join()
    os._exit(1)


def _tokenize(piece: Piece) -> Done:
    return _own(piece)
