"""A training loop of plain transformers, which the trainer is compared with."""

from __future__ import annotations

import warnings
from typing import Any

import pyarrow.parquet as pq

from sftd.domain.spec.learning_rate import learning_rate
from sftd.trainer.data.sample_order import SampleOrder
from tests.builders.trainer.trainers import Run


def router_losses(router_logits: Any, chosen: int) -> Any:
    """The load-balancing and the z loss of one sample, means over the layers: [2]. `router_logits`: of each layer [tokens, experts]."""
    import torch

    found = []
    for logits in router_logits:
        scores, (tokens, experts) = logits.softmax(-1), logits.shape
        counts = torch.nn.functional.one_hot(logits.topk(chosen).indices, experts).sum((0, 1))
        balancing = (counts * experts / (chosen * tokens) * scores.mean(0)).sum()
        found.append(torch.stack((balancing, logits.logsumexp(-1).pow(2).mean())))
    return torch.stack(found).mean(0)


def reference(
    run: Run, steps: int, balance: list[list[float]] | None = None
) -> tuple[list[float], list[float], Any]:
    """Losses, gradient norms and the trained model of a plain transformers loop: each sample by itself, Σ loss ÷ Σ tokens, AdamW.
    `balance` gets the routers' losses of each step."""
    spec = run.attempt.order().spec
    coefficients = [spec.model.moe.load_balancing_loss, spec.model.moe.z_loss]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        # As a rank: other tests run beside, and threads that wait for a core spin.
        torch.set_num_threads(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            spec.model.partial_pretrain, dtype=torch.float32
        )
    table = pq.read_table(spec.data.train_files[0])
    rows = list(zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True))
    order = SampleOrder(len(rows), seed=spec.model.megatron.seed, shuffle=True)
    parameters = list(model.parameters())
    # gpt-oss has the biases of all experts in one matrix.
    decayed = {id(p) for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("_bias")}
    o = spec.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ],
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_eps,
    )
    losses, norms = [], []
    planned = run.attempt.order().planned_steps
    size = spec.data.train_batch_size
    for step in range(steps):
        batch = [rows[i] for i in order.rows(step * size, size)]
        tokens = sum(sum(label != -100 for label in labels[1:]) for _, labels in batch)
        total, routers = 0.0, torch.zeros(2)
        optimizer.zero_grad()
        for ids, labels in batch:
            if "dynamic_rope" in spec.model.partial_pretrain:
                # It would use the frequencies of the longest sample so far.
                rotary = model.model.rotary_emb
                rotary.max_seq_len_cached, rotary.inv_freq = (
                    rotary.original_max_seq_len,
                    rotary.original_inv_freq,
                )
            options = {"output_router_logits": True} if any(coefficients) else {}
            out = model(input_ids=torch.tensor([ids]), **options)
            loss = (
                torch.nn.functional.cross_entropy(
                    out.logits[0, :-1], torch.tensor(labels[1:]), reduction="sum"
                )
                / tokens
            )
            total += loss.item()
            if any(coefficients):
                found = router_losses(out.router_logits, model.config.num_experts_per_tok) / size
                loss = loss + found @ torch.tensor(coefficients)
                routers += found.detach()
            loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, o.clip_grad).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec, planned)
        optimizer.step()
        losses.append(total)
        if balance is not None:
            balance.append(routers.tolist())
    return losses, norms, model


def expert_load(folder: str, rows: list[list[int]]) -> dict[int, float]:
    """Layer → share of the choices of its fullest expert over the tokens of all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    k, found = model.config.num_experts_per_tok, {}
    with torch.no_grad():
        outs = [model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits for row in rows]
    for layer, logits in enumerate(zip(*outs, strict=True)):
        counts = torch.cat(logits).topk(k).indices.flatten().bincount()
        found[layer] = counts.max().item() / counts.sum().item()
    return found
