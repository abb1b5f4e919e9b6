"""The description of a run for a tool process: an order, in the trainer's format."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftd.domain.data.chat_template import ChatTemplate
    from sftd.domain.run.state import CheckpointInfo, Run


@contextmanager
def order_file(
    run: Run, checkpoint: CheckpointInfo | None, model: str = "", template: ChatTemplate | None = None
) -> Iterator[str]:
    """The path of a temporary order.json; see `tool_order` for the arguments."""
    from sftd.wire.attempt.directory import AttemptDir
    from sftd.wire.attempt.orders import tool_order

    with tempfile.TemporaryDirectory(prefix="sftd-") as folder:
        directory = AttemptDir(Path(folder) / "attempt")
        directory.create(tool_order(run, checkpoint, model, template))
        yield str(directory.order_file)
