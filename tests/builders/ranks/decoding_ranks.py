"""Run by test_decoding.py: answers and likelihoods of a model folder, with batches of several sizes, in a layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sftd.trainer.runtime import process

process.prepare()

import msgspec  # noqa: E402

from sftd.domain.spec.spec import Spec  # noqa: E402
from sftd.trainer.decoding.decoder import Decoder  # noqa: E402
from sftd.trainer.model import model as models  # noqa: E402
from sftd.trainer.model import weights  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.trainee import for_answers  # noqa: E402
from sftd.wire.model.folder import read_shape  # noqa: E402


def main(asked: str, out: str) -> None:
    given = json.loads(Path(asked).read_text())
    spec = msgspec.convert(given["spec"], Spec)
    session = sessions.start(spec)
    shape = read_shape(spec.model.partial_pretrain, {})
    chunks = models.build(models.transformer_config(spec, shape, session), shape, session)
    weights.load(chunks, spec.model.partial_pretrain, shape, session.layout)
    trainee = for_answers(spec, shape, session, [chunk.eval() for chunk in chunks])
    prompts = given["prompts"]

    def sampled(rows: int, seed: int = 3) -> list[list[int]]:
        found = Decoder(trainee, rows=rows).answers(
            prompts, limit=12, stops=lambda tokens: tokens[-1] % 6 == 0, temperature=1.0, seed=seed
        )
        return [answer.tokens for answer in sorted(found, key=lambda answer: answer.number)]

    likelihoods = sorted(
        Decoder(trainee, rows=4).likelihoods(given["texts"]), key=lambda likelihood: likelihood.number
    )
    found = {
        "sampled": [sampled(rows) for rows in (1, 3, len(prompts))],
        "of another seed": sampled(3, seed=4),
        "likelihoods": [[each.total, each.tokens, each.is_greedy] for each in likelihoods],
    }
    sessions.close()
    Path(f"{out}.{session.layout.tp_rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
