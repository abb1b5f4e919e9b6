"""Compare the speed of sftd's batched generation with transformers' `generate` on the CPU, with and without its cache:

    python scripts/bench_generate.py MODEL [--prompts 16] [--tokens 64] [--turns 3] [--threads 2]

MODEL is a folder with weights. Prompts are random tokens of 16 to 128 tokens, as one batch; transformers pads them on the left.
Answers are greedy, all of the same number of tokens. The contenders take turns in one process, so that other load on the machine
meets all of them; the median of each contender's turns counts. Prints tokens/s and ratios, the last line as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Measures this checkout, whether or not sftd is installed.
sys.path[:0] = [str(ROOT)]

from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties  # noqa: E402

quiet_third_parties()

import msgspec  # noqa: E402
import torch  # noqa: E402

from sftd.domain.spec.spec import Spec  # noqa: E402
from sftd.trainer.decoding.decoder import Decoder  # noqa: E402
from sftd.trainer.model import model as models  # noqa: E402
from sftd.trainer.model import weights  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.tools.load_model import one_rank  # noqa: E402
from sftd.trainer.trainee import for_answers  # noqa: E402
from sftd.wire.model.folder import read_shape  # noqa: E402


def ours(folder: str, prompts: list[list[int]], tokens: int) -> Callable[[], list[list[int]]]:
    """Answers of sftd."""
    spec = msgspec.convert({"model": {"partial_pretrain": folder}}, Spec)
    session = one_rank(spec, device="cpu", dtype="float32")
    shape = read_shape(folder, {})
    chunks = models.build(models.transformer_config(spec, shape, session), shape, session)
    weights.load(chunks, folder, shape, session.layout)
    decoder = Decoder(
        for_answers(spec, shape, session, [chunk.eval() for chunk in chunks]), rows=len(prompts)
    )

    def run() -> list[list[int]]:
        found = decoder.answers(prompts, limit=tokens, stops=lambda _: False)
        return [answer.tokens for answer in sorted(found, key=lambda answer: answer.number)]

    return run


def theirs(
    folder: str, prompts: list[list[int]], tokens: int
) -> Callable[[bool], Callable[[], list[list[int]]]]:
    """Answers of transformers, with a cache or without."""
    import transformers

    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def of(use_cache: bool) -> Callable[[], list[list[int]]]:
        def run() -> list[list[int]]:
            found = network.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
            )
            return list(found[:, longest:].tolist())

        return run

    return of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    vocab_size = read_shape(arguments.model, {}).vocab_size
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 129, (arguments.prompts,), generator=g).tolist()
    prompts = [torch.randint(3, vocab_size, (n,), generator=g).tolist() for n in lengths]
    peer = theirs(arguments.model, prompts, arguments.tokens)
    contenders = {
        "sftd": ours(arguments.model, prompts, arguments.tokens),
        "transformers, cache": peer(True),
        "transformers, no cache": peer(False),
    }
    torch.set_num_threads(arguments.threads)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers = {}
    for _ in range(arguments.turns):
        for name, run in contenders.items():
            begun = time.perf_counter()
            answers[name] = run()
            seconds[name].append(time.perf_counter() - begun)
    sessions.close()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    same = sum(a == b for a, b in zip(answers["sftd"], answers["transformers, cache"], strict=True))
    print(f"{same} of {len(prompts)} answers equal those of transformers with its cache")
    for name, median in medians.items():
        speed = arguments.prompts * arguments.tokens / median
        print(f"{name:24}{speed:10.1f} tokens/s  {median / medians['sftd']:6.2f} x sftd's time")
    print(json.dumps({"seconds": seconds, "median": medians, "equal": same}))


if __name__ == "__main__":
    main()
