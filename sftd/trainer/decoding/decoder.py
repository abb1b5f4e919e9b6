"""Generates answers of many prompts at once, with a key-value cache, in the layout of the model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sftd.trainer.data.sequence_layout import KeyValueCache, SequenceLayout
from sftd.trainer.decoding import predict
from sftd.trainer.trainee import LossFunction, Trainee


@dataclass(frozen=True)
class Answer:
    """`number`: of the prompt. `tokens`: the new ones, with that which stopped it. `seconds`: since the model got the prompt."""

    number: int
    tokens: list[int]
    is_stopped: bool
    seconds: float


@dataclass(frozen=True)
class Likelihood:
    """Of a text's tokens after its prompt: Σ log-probability in nats, their number, whether each is the most probable token.
    `seconds`: of its batch."""

    number: int
    total: float
    tokens: int
    is_greedy: bool
    seconds: float


class Decoder:
    """Every rank takes part and gets the same results. Data-parallel and context-parallel ranks repeat the same work.

    Rows are padded on the right, so a row's numbers depend on the rows beside it to within rounding only. Weights, gradients
    and random streams are unchanged; set evaluation mode before.
    """

    def __init__(self, trainee: Trainee, *, rows: int) -> None:
        """`rows`: texts that are computed at a time."""
        self._trainee, self._rows = trainee, rows
        self._device, self._layout = trainee.session.device, trainee.session.layout
        self._multiple = self._layout.tp if trainee.config.sequence_parallel else 1

    def answers(
        self,
        prompts: Sequence[list[int]],
        *,
        limit: int,
        stops: Callable[[list[int]], bool],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Answer]:
        """The answer of each prompt of at least one token, in the order in which they end. An answer ends after `limit` tokens or
        where `stops(its tokens)` is true.

        Greedy without a temperature. A sampled token is a function of the seed, the prompt's number and the token's place.
        """
        waiting = self._longest_first([len(prompt) for prompt in prompts])
        cache, numbers = KeyValueCache([]), list[int]()
        new: dict[int, list[int]] = {number: [] for number in waiting}
        begun: dict[int, float] = {}

        def feed(cache: KeyValueCache, numbers: list[int], rows: list[list[int]]) -> None:
            draws = [_draw(seed, number, len(new[number])) for number in numbers] if temperature else []
            for number, token in zip(numbers, self._next(cache, rows, temperature, draws), strict=True):
                new[number].append(token)

        while waiting or numbers:
            first = 0
            if waiting and 2 * len(numbers) <= self._rows:
                # Half of the rows are free: other prompts take their places.
                first, free = len(numbers), self._rows - len(numbers)
                fresh, waiting = waiting[:free], waiting[free:]
                begun |= dict.fromkeys(fresh, time.perf_counter())
                started = KeyValueCache([0] * len(fresh))
                feed(started, fresh, [prompts[number] for number in fresh])
                cache.join(started)
                numbers += fresh
            else:
                feed(cache, numbers, [new[number][-1:] for number in numbers])
            # From the end, because the last row takes the place of one that leaves.
            for row in reversed(range(first, len(numbers))):
                number = numbers[row]
                tokens = new[number]
                is_stopped = stops(tokens)
                if is_stopped or len(tokens) == limit:
                    yield Answer(number, tokens, is_stopped, time.perf_counter() - begun[number])
                    cache.drop(row)
                    numbers[row] = numbers[-1]
                    numbers.pop()

    def likelihoods(self, texts: Sequence[tuple[list[int], int]]) -> Iterator[Likelihood]:
        """Of each text (token ids, number of prompt tokens before those that count; at least 1), in the order in which they are
        computed."""
        order = self._longest_first([len(ids) for ids, _ in texts])
        for first in range(0, len(order), self._rows):
            numbers = order[first : first + self._rows]
            begun = time.perf_counter()
            rows = [texts[number] for number in numbers]
            tokens = self._padded([ids for ids, _ in rows])
            lengths = torch.tensor([len(ids) for ids, _ in rows], device=self._device)
            layout = SequenceLayout(
                qkv_format="sbhd",
                positions=torch.arange(tokens.shape[1], device=self._device),
                lengths=lengths.expand(tokens.shape[1], -1),
            )
            places = [
                place * len(rows) + row
                for row, (ids, prompt) in enumerate(rows)
                for place in range(prompt - 1, len(ids) - 1)
            ]
            at = torch.tensor(places, dtype=torch.int64, device=self._device)
            empty = torch.empty(2, len(places), dtype=torch.float32, device=self._device)
            forward = partial(predict.log_likelihoods, places=at, shape=self._trainee.shape)
            found = self._run(forward, tokens, layout, empty).cpu()
            counts = [len(ids) - prompt for ids, prompt in rows]
            seconds = time.perf_counter() - begun
            for number, count, each in zip(numbers, counts, found.split(counts, dim=1), strict=True):
                total, greedy = each.double().sum(dim=1).tolist()
                yield Likelihood(number, total, count, greedy == count, seconds)

    def _longest_first(self, lengths: list[int]) -> list[int]:
        """Numbers of the texts: similar lengths together, and the longest first, so that memory suffices from then on."""
        return sorted(range(len(lengths)), key=lambda number: -lengths[number])

    def _padded(self, rows: list[list[int]]) -> Tensor:
        """Tokens int64 [b, s], zeros on the right. Sequence parallelism needs a multiple of its ranks."""
        length = -(-max(map(len, rows)) // self._multiple) * self._multiple
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self._device)

    def _next(
        self, cache: KeyValueCache, feed: list[list[int]], temperature: float, draws: list[float]
    ) -> list[int]:
        """Append the tokens `feed` of each row to the cache. Returns the next token of each, on every rank."""
        tokens, counts = self._padded(feed), [len(row) for row in feed]
        before = torch.tensor(cache.lengths, device=self._device)
        fed = torch.tensor(counts, device=self._device)
        positions = torch.arange(tokens.shape[1], device=self._device)
        layout = SequenceLayout(
            qkv_format="sbhd",
            positions=positions[:, None] + before if any(cache.lengths) else positions,
            lengths=(before + fed).expand(tokens.shape[1], -1),
            cache=cache,
        )
        forward = partial(
            predict.next_tokens,
            last=fed - 1,
            shape=self._trainee.shape,
            temperature=temperature,
            draws=torch.tensor(draws, dtype=torch.float64, device=self._device) if draws else None,
        )
        found = self._run(forward, tokens, layout, torch.empty_like(fed))
        cache.advance(counts)
        return [int(token) for token in found.tolist()]

    @torch.no_grad()
    def _run(
        self, function: Callable[..., Tensor], tokens: Tensor, layout: SequenceLayout, result: Tensor
    ) -> Tensor:
        """`function`'s result of the last stage, on every rank. `result`: an empty tensor like it."""

        def forward(_batch: None, model: Any) -> tuple[Tensor, LossFunction]:
            return function(model, tokens, layout), partial(_keep, self._device)

        # The interleaved schedule needs a multiple of PP micro-batches. Only the first one's result is used.
        copies = self._layout.pp if self._layout.vpp > 1 else 1
        rows, length = tokens.shape
        found = self._trainee.run(
            [None] * copies,
            forward,
            rows=rows,
            # Every context-parallel rank computes all tokens, but Megatron's schedules divide the length by CP.
            length=length * self._layout.cp,
            forward_only=True,
        )
        result = found[0] if found else result
        # One rank decides for all. In a near-tie the copies could pick different tokens and stop at different lengths,
        # which deadlocks where they share experts. The source is the first rank of the last stage.
        dist.broadcast(result, dist.get_world_size() - dist.get_world_size() // self._layout.pp)
        return result


def _draw(seed: int, number: int, place: int) -> float:
    """A number of [0, 1) with 53 bits."""
    digest = hashlib.blake2b(f"{seed} {number} {place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _keep(device: torch.device, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return output, torch.zeros((), dtype=torch.int, device=device), output
