"""A training loop of plain transformers, which the trainer is compared with."""

from __future__ import annotations

import warnings
from typing import Any

import pyarrow.parquet as pq

from sftd.domain.spec.learning_rate import learning_rate
from sftd.trainer.data.sample_order import SampleOrder
from tests.builders.trainer.trainers import Run


def reference(run: Run, steps: int) -> tuple[list[float], list[float], Any]:
    """Losses, gradient norms and the trained model of a plain transformers loop: each sample by itself, Σ loss ÷ Σ tokens, AdamW."""
    spec = run.attempt.order().spec
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
        total = 0.0
        optimizer.zero_grad()
        for ids, labels in batch:
            if "dynamic_rope" in spec.model.partial_pretrain:
                # It would use the frequencies of the longest sample so far.
                rotary = model.model.rotary_emb
                rotary.max_seq_len_cached, rotary.inv_freq = (
                    rotary.original_max_seq_len,
                    rotary.original_inv_freq,
                )
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = (
                torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / tokens
            )
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, o.clip_grad).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec, planned)
        optimizer.step()
        losses.append(total)
    return losses, norms, model
