"""Run by torchrun from test_parity.py: computes what only ranks can, and leaves the numbers in found.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sftd.trainer.runtime import process

process.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from sftd.domain.model.parameters import padded_vocabulary  # noqa: E402
from sftd.domain.model.shape import ModelShape  # noqa: E402
from sftd.domain.plan import sizes  # noqa: E402
from sftd.domain.spec.spec import Spec  # noqa: E402
from sftd.trainer.data.batches import Batching  # noqa: E402
from sftd.trainer.data.rows import Sample  # noqa: E402
from sftd.trainer.data.sequence_layout import SequenceLayout  # noqa: E402
from sftd.trainer.model import model as models  # noqa: E402
from sftd.trainer.model import weights  # noqa: E402
from sftd.trainer.model.loss import linear_cross_entropy, vocab_parallel_cross_entropy  # noqa: E402
from sftd.trainer.runtime import session as sessions  # noqa: E402
from sftd.trainer.runtime.session import Session  # noqa: E402
from sftd.wire.attempt.directory import AttemptDir  # noqa: E402
from sftd.wire.model.folder import read_shape  # noqa: E402


def build(spec: Spec, folder: str, session: Session) -> tuple[Any, ModelShape]:
    shape = read_shape(folder, {})
    chunks = models.build(models.transformer_config(spec, shape, session), shape, session)
    weights.load(chunks, folder, shape, session.layout)
    return chunks[0].eval(), shape


def whole(share: torch.Tensor) -> torch.Tensor:
    """The last dimension gathered over the tensor-parallel ranks."""
    parts = [torch.empty_like(share) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, share.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    return whole(model(tokens, layout.positions[None], None, packed_seq_params=layout))[0]


def cross_entropy(session: Session, vocabulary: int) -> tuple[float, float, float]:
    """Largest differences of loss and gradient from PyTorch, and the largest gradient of a padding row."""
    generator = torch.Generator().manual_seed(3)
    padded = padded_vocabulary(vocabulary, session.layout.tp)
    full = torch.randn(9, padded, generator=generator) * 5
    # A padding row that would win if it were looked at.
    full[:, vocabulary:] = 50.0
    labels = torch.randint(0, vocabulary, (9,), generator=generator)
    labels[[2, 5]] = -100
    truth = full[:, :vocabulary].clone().requires_grad_()
    per_token = torch.nn.functional.cross_entropy(truth, labels, ignore_index=-100, reduction="none")
    scale = torch.arange(1.0, 10.0)
    (per_token * scale).sum().backward()
    width = padded // session.layout.tp
    mine = full[:, session.layout.tp_rank * width :][:, :width].clone().requires_grad_()
    found = vocab_parallel_cross_entropy(mine, labels, vocab_size=vocabulary)
    (found * scale).sum().backward()
    gradient = whole(mine.grad)
    return (
        (found - per_token).abs().max().item(),
        (gradient[:, :vocabulary] - truth.grad).abs().max().item(),
        gradient[:, vocabulary:].abs().max().item() if padded > vocabulary else 0.0,
    )


def linear(session: Session, vocabulary: int, softcap: float | None) -> dict[str, float]:
    """Largest differences of the chunked, weighted linear + cross-entropy from PyTorch: loss, gradients of hidden states and
    weight, figures; and what evaluation alone adds to the weight's gradient. 300 rows are three chunks here."""
    sizes.LOGITS_BYTES = 1
    generator = torch.Generator().manual_seed(5)
    padded = padded_vocabulary(vocabulary, session.layout.tp)
    full, hidden = torch.randn(padded, 16, generator=generator), torch.randn(300, 16, generator=generator)
    labels = torch.randint(0, vocabulary, (300,), generator=generator)
    labels[::7] = -100
    truth, inputs = full[:vocabulary].clone().requires_grad_(), hidden.clone().requires_grad_()
    logits = inputs @ truth.t()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    weights = torch.rand(300, generator=generator) * 2
    sources = torch.arange(300) % 5 // 2
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights
    expected = losses.sum() / 3
    expected.backward()
    log = logits.detach().log_softmax(-1)[labels != -100].double()
    by_hand = torch.cat(
        (
            (log.argmax(-1) == labels[labels != -100]).sum()[None].double(),
            -(log.exp() * log).sum()[None],
            torch.stack([losses[sources == n].sum().detach() for n in range(3)]).double(),
        )
    )
    width = padded // session.layout.tp
    first = session.layout.tp_rank * width
    weight: Any = torch.nn.Parameter(full[first : first + width].clone())
    weight.main_grad = torch.zeros(width, 16)
    mine = hidden.clone().requires_grad_()
    options: Any = {"divisor": 3.0, "vocab_size": vocabulary, "softcap": softcap, "weights": weights}
    with torch.no_grad():
        linear_cross_entropy(mine, weight, labels, **options)
    untouched = weight.main_grad.abs().max().item()
    figures, of_one, pair = (torch.zeros(n, dtype=torch.float64) for n in (5, 3, 2))
    found = linear_cross_entropy(mine, weight, labels, **options, figures=figures, sources=sources)
    with torch.no_grad():
        # A micro-batch whose rows are all of the first source, and a run with one source.
        for sums in (of_one, pair):
            linear_cross_entropy(mine, weight, labels, **options, figures=sums)
    others = torch.cat((of_one - torch.cat((by_hand[:2], by_hand[2:].sum()[None])), pair - by_hand[:2]))
    found.backward()
    assert mine.grad is not None
    dist.all_reduce(mine.grad, group=parallel_state.get_tensor_model_parallel_group())
    real = max(0, min(width, vocabulary - first))
    return {
        "linear_loss": (found - expected).abs().item() / expected.item(),
        "linear_hidden": (mine.grad - inputs.grad).abs().max().item(),
        "linear_weight": (weight.main_grad[:real] - truth.grad[first : first + real]).abs().max().item(),
        "linear_evaluation": untouched,
        "linear_figures": torch.cat((figures - by_hand, others)).abs().max().item(),
    }


def packing(model: Any, spec: Spec, session: Session) -> dict[str, Any]:
    batching = Batching.of(spec, session)
    generator = torch.Generator().manual_seed(4)
    samples = []
    for length in (11, 17, 7):
        tokens = torch.randint(3, 250, (length,), generator=generator).numpy()
        samples.append(Sample(tokens, tokens))
    batch = batching.make(samples, 40)
    before = logits(model, batch.tokens, batch.layout)
    tokens = batch.tokens.clone()
    tokens[0, 15] += 1
    after = logits(model, tokens, batch.layout)
    alone = batching.make([samples[1]], 17)
    apart = logits(model, alone.tokens, alone.layout)
    return {
        "neighbours_unchanged": torch.equal(before[:11], after[:11]) and torch.equal(before[28:], after[28:]),
        "perturbed_changed": not torch.equal(before[15:28], after[15:28]),
        "packed_against_alone": (before[11:28] - apart).abs().max().item(),
    }


def main(path: str) -> None:
    attempt = AttemptDir(path)
    spec = attempt.order().spec
    session = sessions.start(spec)
    given = torch.load(attempt.path / "expected.pt")
    tokens = torch.tensor([given["tokens"]])
    layout = SequenceLayout(qkv_format="sbhd", positions=torch.arange(tokens.shape[1]))
    found: dict[str, Any] = {"logits": {}}
    for name, expected in given["expected"].items():
        model, shape = build(spec, str(Path(given["models"]) / name), session)
        difference = logits(model, tokens, layout)[:, : shape.vocab_size] - expected
        found["logits"][name] = difference.abs().max().item()
        if name == "llama_tied":
            found |= packing(model, spec, session)
    found["loss"], found["gradient"], _ = cross_entropy(session, 250)
    found["padded_loss"], _, found["padding_gradient"] = cross_entropy(session, 251)
    found |= linear(session, 251, None)
    # Half of the logits are beyond the cap.
    found |= {f"capped_{name}": value for name, value in linear(session, 251, 3.0).items()}
    if session.layout.tp_rank == 0:
        (attempt.path / "found.json").write_text(json.dumps(found))
    sessions.close()


if __name__ == "__main__":
    main(sys.argv[1])
