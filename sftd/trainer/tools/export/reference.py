"""What the trainer's own model computes on recorded rows, for `prove`:
`python -m sftd.trainer.tools.export.reference ORDER CHECKPOINT FILE --position P [--digest SHA256] [--merge]`.

ORDER is the order.json of an attempt of the run, CHECKPOINT the folder of one of its checkpoints, P the position of the first
row in the order of samples. Computes in FP32 on the CPU with weights that are rounded to the checkpoint's dtype. Without
--merge, the model of an adapter is not quantised: that is for the users of the adapter to decide. Writes FILE and JSON lines to standard output, the last one `done`. Exit codes: 0; 2 with a message on standard error for an error that
the user can fix; any other code is a defect.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

    from sftd.trainer.data.sequence_layout import KeyValueCache
    from sftd.wire.attempt.directory import Order

_USER_ERROR = 2
# Of the training data and of the validation data.
_ROWS = 4
# Of a row, spread over its length: all logits of a long row would take gigabytes.
_POSITIONS = 64
_NEW_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Compute and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.export.reference", description="Compute on recorded rows."
    )
    parser.add_argument("order", type=Path, help="order.json of an attempt of the run")
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("file", type=Path, help="file to write")
    parser.add_argument("--position", type=int, required=True, help="first row, in the order of samples")
    parser.add_argument("--digest", help="sha256 of the checkpoint's manifest.json")
    parser.add_argument("--merge", action="store_true", help="as for the export")
    arguments = parser.parse_args(argv)
    # The run may train on the GPU meanwhile.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties

    quiet_third_parties()
    from sftd.domain.errors import CheckpointInvalid, Refused
    from sftd.trainer.errors import UserError
    from sftd.trainer.tools.protocol import claim_stdout
    from sftd.wire.checkpoint.directory import reading

    events = claim_stdout()
    try:
        with reading(arguments.checkpoint):
            _compute(arguments, events)
    except (Refused, UserError, CheckpointInvalid, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return _USER_ERROR
    finally:
        events.close()
    return 0


def _compute(arguments: argparse.Namespace, events: Any) -> None:
    import torch
    from safetensors.torch import save_file

    from sftd.trainer.runtime import session as sessions
    from sftd.trainer.tools.export.prove import Reference, encode
    from sftd.trainer.tools.load_model import one_rank, read_model
    from sftd.wire.attempt.directory import read_order
    from sftd.wire.checkpoint.manifest import verify
    from sftd.wire.data.dataset import files_digest
    from sftd.wire.model.folder import read_shape

    order = read_order(arguments.order)
    spec = order.spec
    if not arguments.merge:
        spec = msgspec.structs.replace(spec, model=msgspec.structs.replace(spec.model, quantize="none"))
    events.progress("reading the data files")
    rows = _rows(order, arguments.position)
    digest = files_digest(spec.data.all_train_files)
    events.progress("verifying the checkpoint")
    manifest = verify(arguments.checkpoint, arguments.digest)
    events.progress("loading the trainer's model")
    shape = read_shape(spec.model.partial_pretrain, spec.model.override_config)
    session = one_rank(spec, device="cpu", dtype="float32")
    (model,) = read_model(spec, shape, session, arguments.checkpoint)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, manifest.dtype)))
        for number, (ids, marks) in enumerate(rows):
            events.progress(f"the trainer's row {number + 1} of {len(rows)}")
            tensors |= {
                f"{name}.{number}": value for name, value in _row(model, ids, marks, shape.vocab_size).items()
            }
    sessions.close()
    rounding = manifest.dtype if arguments.merge else "float32"
    reference = Reference(rows=len(rows), dtype=manifest.dtype, rounding=rounding)
    save_file(tensors, arguments.file, metadata=encode(reference))
    events.emit("done", train_digest=digest, rows=len(rows))


def _rows(order: Order, position: int) -> list[tuple[list[int], list[bool]]]:
    """Ids and marks of trained tokens of the rows to compare on: the first from `position` on that the run trained on, and
    the first of its validation data."""
    from sftd.trainer.data.sample_order import order_of
    from sftd.trainer.tools.seen_rows import tokens_of, usable

    data = order.spec.data
    rows = usable(data, data.all_train_files)
    samples = order_of(order.spec, rows, order.mixture)
    numbers = rows.numbers[samples.rows(position, min(_ROWS, len(rows)))]
    found = tokens_of(data, data.all_train_files, numbers)
    if val_files := data.all_val_files:
        found += tokens_of(data, val_files, usable(data, val_files).numbers[:_ROWS])
    return found


def _row(model: GPTModel, ids: list[int], marks: list[bool], vocab_size: int) -> dict[str, Tensor]:
    """The tensors of `prove.Reference` for a row."""
    import torch

    from sftd.trainer.data.sequence_layout import KeyValueCache

    trained = [place for place, is_trained in enumerate(marks) if is_trained]
    # The token before predicts it.
    places = [place - 1 for place in trained[:: -(-len(trained) // _POSITIONS)]]
    cache, feed, logits = KeyValueCache([0]), ids[: trained[0]], []
    for _ in range(_NEW_TOKENS):
        logits.append(_logits(model, feed, [len(feed) - 1], vocab_size, cache))
        cache.advance([len(feed)])
        feed = [int(logits[-1].argmax())]
    return {
        "ids": torch.tensor(ids),
        "places": torch.tensor(places),
        "logits": _logits(model, ids, places, vocab_size),
        "prompt": torch.tensor(trained[0]),
        "following": torch.cat(logits),
    }


def _logits(
    model: GPTModel, ids: list[int], places: list[int], vocab_size: int, cache: KeyValueCache | None = None
) -> Tensor:
    """FP32 [places, vocab_size] at the places of `ids`, which follow what the cache holds."""
    import torch

    from sftd.trainer.data.sequence_layout import SequenceLayout

    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids)) + (cache.lengths[0] if cache else 0)
    found: Any = model(
        tokens,
        positions[None],
        None,
        labels=tokens,
        packed_seq_params=SequenceLayout(qkv_format="sbhd", positions=positions, cache=cache),
        output_processor=_head,
        output_processor_context=places,
    )
    return found[:, :vocab_size].float().contiguous()


def _head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: list[int], **_: object
) -> Tensor:
    logits, _bias = output_layer(hidden_states[context], weight=output_weight)
    return logits[:, 0]


if __name__ == "__main__":
    sys.exit(main())
