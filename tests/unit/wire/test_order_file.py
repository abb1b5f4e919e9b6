"""What tools are given of a run in the log: the order that they read says which checkpoint it must be."""

from __future__ import annotations

from pathlib import Path

from sftd.cli.order_file import order_file
from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.run.state import CheckpointInfo, Run
from sftd.domain.spec.model_section import Model
from sftd.domain.spec.spec import OrderStart, Spec
from sftd.wire.attempt.directory import Order, read_order

SPEC = Spec(model=Model(partial_pretrain="/of-the-run"))
CHECKPOINT = CheckpointInfo(
    step=20, path="/c/step-20", bytes=1, manifest_digest="m", tokens_total=1, version=9, published_at=1
)
RUN = Run("run", spec=SPEC, attempt=2, planned_steps=30, order=(OrderStart(), OrderStart(10, 90)))
TEMPLATE = ChatTemplate(name="short")


def test_a_tool_gets_what_the_log_knows_of_the_checkpoint() -> None:
    with order_file(RUN, CHECKPOINT, "/copy", TEMPLATE) as path:
        assert read_order(Path(path)) == Order(
            run_id="run",
            attempt=2,
            token="",
            spec=Spec(model=Model(partial_pretrain="/copy")),
            planned_steps=30,
            checkpoint_dir="/c",
            checkpoint="/c/step-20",
            checkpoint_digest="m",
            order_later=[OrderStart(), OrderStart(10, 90)],
            template=TEMPLATE,
        )
    assert not Path(path).exists()
    with order_file(RUN, None) as path:
        order = read_order(Path(path))
    assert (order.checkpoint, order.checkpoint_digest, order.spec) == (None, None, SPEC)
