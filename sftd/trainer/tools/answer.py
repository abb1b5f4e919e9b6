"""Answers from a checkpoint: `python -m sftd.trainer.tools.answer ORDER CHECKPOINT [--digest SHA256] [--device DEVICE]`.

ORDER is an attempt's order.json. Reads a JSON array of prompts from standard input. Writes JSON lines to standard output:
`progress` events, then `done` with the answers in the order of the prompts. Exit codes: 0; 2 with a message on standard
error for an error that the user can fix; any other code is a defect.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the prompts and return the exit code."""
    # Before torch is imported: its output must not mix with the events.
    from sftd.trainer.tools.protocol import claim_stdout

    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.answer", description="Answer prompts."
    )
    parser.add_argument("order", type=Path, help="an attempt's order.json")
    parser.add_argument("checkpoint", type=Path, help="folder of a published checkpoint")
    parser.add_argument("--digest", help="sha256 of the checkpoint's manifest")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-tokens", type=int, help="longest answer; as in the run when not given")
    arguments = parser.parse_args(argv)
    events = claim_stdout()

    from sftd.domain.errors import CheckpointInvalid, Refused
    from sftd.trainer.errors import UserError
    from sftd.wire.checkpoint.directory import reading

    try:
        prompts = msgspec.json.decode(sys.stdin.buffer.read(), type=list[str])
        with reading(arguments.checkpoint):
            _answer(arguments, prompts, events)
    except (UserError, CheckpointInvalid, Refused, msgspec.MsgspecError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return _USER_ERROR
    return 0


def _answer(arguments: argparse.Namespace, prompts: list[str], events: Any) -> None:
    from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties
    from sftd.trainer.runtime.process import set_cuda_defaults

    # Before Megatron is imported, because its import warns.
    quiet_third_parties()
    set_cuda_defaults()
    from sftd.trainer.loop.generate import Generator
    from sftd.trainer.runtime import session as sessions
    from sftd.trainer.tools.load_model import one_rank, one_rank_spec, read_model
    from sftd.trainer.trainee import for_answers
    from sftd.wire.attempt.directory import read_order
    from sftd.wire.checkpoint.manifest import verify
    from sftd.wire.model.folder import read_shape

    order = read_order(arguments.order)
    events.progress("verifying the checkpoint")
    manifest = verify(arguments.checkpoint, arguments.digest)
    events.progress("loading")
    spec = one_rank_spec(order.spec, device=arguments.device, dtype=manifest.dtype)
    replace = msgspec.structs.replace
    limit = arguments.max_tokens or spec.trainer.sample_max_tokens
    spec = replace(spec, trainer=replace(spec.trainer, sample_prompts=prompts, sample_max_tokens=limit))
    shape = read_shape(spec.model.partial_pretrain, spec.model.override_config)
    session = one_rank(spec, device=arguments.device, dtype=manifest.dtype)
    generator = Generator(spec, shape.vocab_size, order.template)
    trainee = for_answers(spec, shape, session, read_model(spec, shape, session, arguments.checkpoint))
    events.progress("answering")
    found = {answer.prompt: answer for answer in generator.answers(manifest.step, trainee)}
    sessions.close()
    events.emit("done", step=manifest.step, answers=[msgspec.to_builtins(found[p]) for p in prompts])


if __name__ == "__main__":
    sys.exit(main())
