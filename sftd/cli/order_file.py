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
    """The path of a temporary order.json, built from the log: the attempt's own folder may be deleted or on another host.
    The tool reads config and tokenizer from `model`, by default the run's model folder. `template` is the chat template
    of the run's data."""
    import msgspec

    from sftd.wire.attempt.directory import AttemptDir
    from sftd.wire.attempt.orders import order_of

    if model:
        spec = msgspec.structs.replace(
            run.spec, model=msgspec.structs.replace(run.spec.model, partial_pretrain=model)
        )
        run = msgspec.structs.replace(run, spec=spec)
    with tempfile.TemporaryDirectory(prefix="sftd-") as folder:
        directory = AttemptDir(Path(folder) / "attempt")
        parent = Path(checkpoint.path).parent if checkpoint else ""
        directory.create(order_of(run, checkpoint, checkpoint_dir=parent, template=template))
        yield str(directory.order_file)
