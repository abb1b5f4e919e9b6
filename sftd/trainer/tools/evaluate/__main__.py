"""Runs an evaluation of a checkpoint:
`python -m sftd.trainer.tools.evaluate ORDER CHECKPOINT --evaluation FILE --output FOLDER [--digest SHA256] [--device DEVICE]`.

ORDER is an attempt's order.json. FILE is the evaluation as in the spec, as JSON. Writes the answers to FOLDER, and JSON lines to
standard output: `progress` events, those of stage `answering` with the numbers of questions `done` and in `total`; then `done`
with `metrics`, the number of `questions`, `questions_digest`, `environment`, and the path of the `answers`. Exit codes: 0; 2 with a
message on standard error for an error that the user can fix; any other code is a defect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and return the exit code."""
    # Before torch is imported: its output must not mix with the events.
    from sftd.trainer.tools.protocol import claim_stdout

    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.evaluate", description="Run an evaluation of a checkpoint."
    )
    parser.add_argument("order", type=Path, help="an attempt's order.json")
    parser.add_argument("checkpoint", type=Path, help="folder of a published checkpoint")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON file with the evaluation")
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers")
    parser.add_argument("--digest", help="sha256 of the checkpoint's manifest")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    events = claim_stdout()

    from sftd.domain.errors import CheckpointInvalid, Refused
    from sftd.trainer.errors import UserError
    from sftd.wire.checkpoint.directory import reading

    try:
        with reading(arguments.checkpoint):
            _evaluate(arguments, events)
    except (UserError, CheckpointInvalid, Refused, msgspec.MsgspecError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return _USER_ERROR
    finally:
        events.close()
    return 0


def _evaluate(arguments: argparse.Namespace, events: Any) -> None:
    from sftd.domain.spec.evaluation_section import HarnessEvaluation, PromptsEvaluation
    from sftd.trainer.tools.evaluate import harness, questions

    evaluation = msgspec.json.decode(
        arguments.evaluation.read_bytes(), type=PromptsEvaluation | HarnessEvaluation
    )
    # Before the checkpoint is read, which may take minutes.
    asked = questions.read(evaluation) if isinstance(evaluation, PromptsEvaluation) else None
    if asked is None:
        harness.check_installed()

    from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties
    from sftd.trainer.runtime.process import set_cuda_defaults

    # Before Megatron is imported, because its import warns.
    quiet_third_parties()
    set_cuda_defaults()
    from sftd.trainer.decoding.decoder import Decoder
    from sftd.trainer.decoding.prompts import Prompts
    from sftd.trainer.runtime import session as sessions
    from sftd.trainer.tools.evaluate.ask import ask
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
    shape = read_shape(spec.model.partial_pretrain, spec.model.override_config)
    renderer = Prompts(spec.model, shape.vocab_size, order.template)
    session = one_rank(spec, device=arguments.device, dtype=manifest.dtype)
    trainee = for_answers(spec, shape, session, read_model(spec, shape, session, arguments.checkpoint))
    decoder = Decoder(trainee, rows=evaluation.batch_size)

    def progress(done: int, total: int) -> None:
        events.progress("answering", done=done, total=total)

    if isinstance(evaluation, PromptsEvaluation):
        assert asked is not None
        result = ask(evaluation, asked, decoder, renderer, progress)
    else:
        result = harness.run(evaluation, decoder, renderer, shape.max_position_embeddings, progress)
    environment = sessions.environment(session)
    sessions.close()
    answers = result.write(arguments.output)
    events.emit(
        "done",
        step=manifest.step,
        metrics=result.metrics,
        questions=len(result.rows),
        questions_digest=result.digest,
        environment=environment,
        answers=str(answers),
    )


if __name__ == "__main__":
    sys.exit(main())
