"""A function of a piece, called in several processes, its results in the order of the pieces."""

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

# Pieces in front of or after a worker: what is in memory does not depend on the size of the files.
_AHEAD = 3
# Imported once, by the process that the workers are forked from.
_WITHOUT_TORCH = "sftd.trainer.chat.without_torch"
_PRELOAD = ["transformers.models.auto.tokenization_auto", __name__]


def default_workers(size: int) -> int:
    """A worker a core, but no more than one for each 8 MB: for fewer bytes it would take longer to start them."""
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
            "A worker process has ended on its own, killed perhaps for its memory. Use fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_own: Callable[[Piece], Done]


def _start(model: Path, options: TokenizeOptions) -> None:
    """Make this process a worker."""
    global _own  # noqa: PLW0603  a pool's worker has no other place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
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
