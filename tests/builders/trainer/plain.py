"""Training, validation and answers as one would write them in a notebook: transformers, one row at a time, torch's AdamW in
FP32. Nothing here is shared with sftd, so that an error of all its layouts shows."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LETTERS = "abcdef"
EOS, BOS = 0, 1
Row = tuple[list[int], list[int]]


def make_model(folder: Path) -> None:
    """A Llama of nine tokens: a padded vocabulary has ranks without any. Every logit is far below 0, which padding would have.

    The tokenizer puts a BOS before what it is given, as Llama's does, and so does the template.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
        from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
        from tokenizers.models import WordLevel

        words = {"<eos>": EOS, "<bos>": BOS, "<unk>": 2} | {c: 3 + i for i, c in enumerate(LETTERS)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        )
        fast.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}f{% endif %}"
        )
        config = transformers.LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=False,
            eos_token_id=EOS,
            bos_token_id=BOS,
        )
        torch.manual_seed(11)
        network = transformers.LlamaForCausalLM(config).float()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            network.model.embed_tokens.weight.mul_(10.0)
            network.model.embed_tokens.weight[:, 0] += 25.0
            network.lm_head.weight[:, 0] -= 20.0
        network.save_pretrained(folder)
        fast.save_pretrained(folder)


def usable(rows: Iterable[Row], longest: int) -> list[tuple[int, Row]]:
    """(number, row) of the rows of which some token after the first is trained, cut on the right."""
    cut = [(ids[:longest], labels[:longest]) for ids, labels in rows]
    return [(n, row) for n, row in enumerate(cut) if count(row)]


def count(row: Row) -> int:
    """Tokens of a row that are predicted and trained."""
    return sum(label != -100 for label in row[1][1:])


@dataclass(frozen=True)
class Settings:
    """Of one step."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip: float


@dataclass
class Plain:
    """A model that is trained step by step."""

    folder: Path
    # PEFT folder of the adapter that is trained in place of the model.
    adapter: Path | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    # Of each step: share of the trained tokens with the highest logit, and their mean entropy.
    figures: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            import transformers

            self.network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, attn_implementation="eager"
            )
            if self.adapter:
                import peft

                self.network = peft.PeftModel.from_pretrained(self.network, self.adapter, is_trainable=True)
        parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self._decayed = [p for name, p in parameters.items() if "norm" not in name]
        self._others = [p for name, p in parameters.items() if "norm" in name]
        groups = [{"params": self._decayed}, {"params": self._others}]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]])

    def copy(self) -> Plain:
        """An independent one in the same state."""
        return copy.deepcopy(self)

    def loss(self, row: Row, weights: Sequence[float] | None = None) -> Any:
        """Σ weight · cross-entropy of a row's trained tokens. weights: of each token, 1 if None."""
        return self.look(row, weights)[0]

    def look(self, row: Row, weights: Sequence[float] | None = None) -> tuple[Any, int, float]:
        """As `loss`; the number of trained tokens with the highest logit; the sum of their entropies."""
        import torch

        ids, labels = row
        logits = self.network(input_ids=torch.tensor([ids])).logits[0]
        log = logits[:-1].log_softmax(-1)
        loss, right, entropy = torch.zeros(()), 0, 0.0
        for i, label in enumerate(labels[1:]):
            if label != -100:
                loss = loss - log[i, label] * (1.0 if weights is None else weights[i + 1])
                right += int(log[i].argmax()) == label
                entropy -= float((log[i].exp() * log[i]).sum().detach())
        return loss, right, entropy

    def step(
        self,
        batch: Sequence[Row],
        settings: Settings,
        *,
        most: float = math.inf,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """One optimizer step; its update is left out where the loss is above `most` or no number. weights: of each row."""
        import torch

        self._adamw.zero_grad()
        looks = [self.look(row, None if weights is None else weights[n]) for n, row in enumerate(batch)]
        tokens = sum(map(count, batch))
        if weights is None:
            divisor = float(tokens)
        else:
            divisor = sum(
                w
                for (_, labels), row in zip(batch, weights, strict=True)
                for label, w in list(zip(labels, row, strict=True))[1:]
                if label != -100
            )
        loss = sum(found for found, _, _ in looks) / divisor
        self.figures.append(
            (sum(right for _, right, _ in looks) / tokens, sum(e for *_, e in looks) / tokens)
        )
        loss.backward()
        gradients = [p.grad for p in self.network.parameters() if p.requires_grad]
        norm = torch.cat([g.flatten() for g in gradients]).double().norm().item()
        self.losses.append(loss.item())
        self.norms.append(norm)
        if not (math.isfinite(norm) and loss.item() <= most):
            return
        if settings.clip and norm > settings.clip:
            for gradient in gradients:
                gradient.mul_(settings.clip / norm)
        for group in self._adamw.param_groups:
            group |= {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
        self._adamw.param_groups[0]["weight_decay"] = settings.weight_decay
        if self._others:
            self._adamw.param_groups[1]["weight_decay"] = 0.0
        self._adamw.step()

    def validation(self, rows: Iterable[Row]) -> tuple[float, int, float, float]:
        """Loss per trained token over all rows, their number of trained tokens, the share of those with the highest logit, and
        their mean entropy."""
        import torch

        rows = list(rows)
        tokens = sum(map(count, rows))
        with torch.no_grad():
            looks = [self.look(row) for row in rows]
        loss, right, entropy = (sum(float(look[n]) for look in looks) / tokens for n in range(3))
        return loss, tokens, right, entropy

    def answer(self, prompt: str, limit: int) -> tuple[str, int, bool]:
        """Text, tokens and whether it ended by itself, of the most probable answer to a user's message."""
        import torch

        ids = [BOS, *(3 + LETTERS.index(c) for c in prompt), 3 + LETTERS.index("f")]
        new: list[int] = []
        while len(new) < limit and EOS not in new:
            with torch.no_grad():
                logits = self.network(input_ids=torch.tensor([ids + new])).logits[0, -1]
            assert float(logits.max()) < -1.0, "a padding token, whose logit is 0, would not be chosen"
            best = logits.sort().values
            assert float(best[-1] - best[-2]) > 1e-3, "two tokens are as probable: rounding decides"
            new.append(int(logits.argmax()))
        return "".join(LETTERS[i - 3] for i in new if i > 2), len(new), EOS in new
