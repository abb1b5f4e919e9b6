"""Greedy answers to fixed prompts, from the model as it is being trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.log.events import SampleGenerated
from sftd.domain.spec.spec import Spec
from sftd.trainer.chat.template import BoundTemplate
from sftd.trainer.chat.tokenizer import check_has_tokenizer, stop_token_ids
from sftd.trainer.data.sequence_layout import KeyValueCache, SequenceLayout
from sftd.trainer.errors import UserError
from sftd.trainer.model import model as models
from sftd.trainer.runtime.session import Session
from sftd.trainer.trainee import LossFunction, Trainee


class Generator:
    """Answers `trainer.sample_prompts`. Every rank takes part; each data-parallel copy and context-parallel rank computes the same."""

    def __init__(self, spec: Spec, session: Session, vocab_size: int, template: ChatTemplate | None) -> None:
        """Prompts are rendered as the training data was, with `template`; None is the model folder's. Raises `UserError` for a
        tokenizer or prompt that cannot be used."""
        # transformers takes seconds to import: only runs with sample prompts pay for it.
        from transformers import AutoTokenizer

        folder = spec.model.partial_pretrain
        try:
            check_has_tokenizer(Path(folder))
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=spec.model.trust_remote_code
            )
            self._stops = stop_token_ids(self._tokenizer, Path(folder))
        except Exception as error:  # a tokenizer folder can fail in any way
            raise UserError(f"the prompts need the tokenizer of {folder}: {error}") from error
        self._template = BoundTemplate(self._tokenizer, template)
        self._prompts = {prompt: self._checked(prompt, vocab_size) for prompt in spec.trainer.sample_prompts}
        self._limit = spec.trainer.sample_max_tokens
        self._session = session
        self._multiple = session.layout.tp if spec.model.megatron.sequence_parallel else 1

    def answers(self, step: int, trainee: Trainee) -> list[SampleGenerated]:
        """One event for each prompt. Leaves weights, gradients and random streams as they were."""
        trainee.train(False)
        with torch.no_grad():
            events = [self._answer(step, trainee, prompt, ids) for prompt, ids in self._prompts.items()]
        trainee.train(True)
        return events

    def _checked(self, prompt: str, vocab_size: int) -> list[int]:
        try:
            ids = self._template.prompt_ids(prompt)
        except Exception as error:  # a chat template is a program
            raise UserError(f"the prompt {prompt!r} cannot be rendered: {error}") from error
        if not ids or max(ids) >= vocab_size:
            raise UserError(f"the prompt {prompt!r} makes no tokens that the model knows")
        return ids

    def _answer(self, step: int, trainee: Trainee, prompt: str, ids: list[int]) -> SampleGenerated:
        cache = KeyValueCache()
        new: list[int] = []
        stopped, feed = False, ids
        while len(new) < self._limit and not stopped:
            token = self._next(trainee, cache, feed)
            new.append(token)
            stopped, feed = token in self._stops, [token]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        return SampleGenerated(step=step, prompt=prompt, text=text, tokens=len(new), stopped=stopped)

    def _next(self, trainee: Trainee, cache: KeyValueCache, feed: list[int]) -> int:
        """Feed tokens after those in the cache. Returns the token that follows, on every rank."""
        device = self._session.device
        length = -(-len(feed) // self._multiple) * self._multiple
        tokens = torch.tensor([feed + [0] * (length - len(feed))], device=device)
        positions = torch.arange(cache.length, cache.length + length, device=device)
        layout = SequenceLayout(qkv_format="sbhd", positions=positions, cache=cache)

        def forward(_batch: None, model: Any) -> tuple[Tensor, LossFunction]:
            output = models.next_token(model, tokens, layout, len(feed) - 1, trainee.shape.vocab_size)
            return output, partial(_keep, device)

        # The interleaved schedule takes micro-batches by the number of stages only; the copies are not looked at.
        copies = self._session.layout.pp if self._session.layout.vpp > 1 else 1
        # Every context-parallel rank computes the whole; Megatron's schedules count on a share.
        whole = length * self._session.layout.cp
        found = trainee.run([None] * copies, forward, rows=1, length=whole, forward_only=True)
        token = found[0] if found else torch.empty(1, dtype=torch.int64, device=device)
        # One rank decides for all: copies that differ in a near-tie would stop at different tokens, and wait for each
        # other where they share experts. The last stage's ranks are the last ones.
        dist.broadcast(token, dist.get_world_size() - dist.get_world_size() // self._session.layout.pp)
        # Padding after the fed tokens is forgotten.
        cache.length += len(feed)
        return int(token)


def _keep(device: torch.device, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return output, torch.zeros((), dtype=torch.int, device=device), output
