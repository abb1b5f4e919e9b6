"""The lean optimizer's update: AdamW on average, rounded by bits that each element owns."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch

from sftd.trainer.optimizer import lean_update
from sftd.trainer.optimizer.lean import LeanAdamW
from sftd.trainer.optimizer.lean_update import Rectangle

GROUP: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def bf16(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return x.bfloat16().view(torch.uint16).numpy().copy()


def words(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 1 << 16, shape, dtype=np.uint32)


def test_a_value_goes_to_either_neighbour_and_its_mean_is_exact() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).numpy()
    trials = 4096
    found = lean_update.rounded(np.repeat(x[None], trials, 0), words(trials, 64))
    values = lean_update.widened(found).astype(np.float64)
    low = lean_update.widened((x.view(np.uint32) >> 16).astype(np.uint16))
    gap = np.abs(lean_update.widened((x.view(np.uint32) >> 16).astype(np.uint16) + np.uint16(1)) - low)
    assert np.isin(np.abs(values - low), [np.zeros_like(gap), gap]).all()
    assert (np.abs(values.mean(0) - x) < 4 * gap / 2 / trials**0.5).all()
    # Rounding to the nearest would leave most of them beside it.
    assert (
        np.abs(lean_update.widened(bf16(torch.from_numpy(x))) - x) > 4 * gap / 2 / trials**0.5
    ).mean() > 0.5


def test_what_bf16_holds_stays() -> None:
    whole = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, 3.3895e38, float("inf"), -float("inf")])
    bits = bf16(whole)
    for noise in (0, 1, 0xFFFF):
        again = lean_update.rounded(lean_update.widened(bits), np.full(8, noise, np.uint32))
        assert (again == bits).all()
    # The NaN of a GPU has all bits set: what is added to it must not carry into the sign.
    nan = np.array([0x7FFFFFFF, 0xFFC00000], np.uint32).view(np.float32)
    assert np.isnan(lean_update.widened(lean_update.rounded(nan, np.full(2, 0xFFFF, np.uint32)))).all()


def test_updates_are_adamw_on_average() -> None:
    """Three updates of 200 copies of some weights, each with bits of its own, against torch's AdamW in FP64."""
    n, copies = 40, 5000
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(n, generator=generator) * 0.02).bfloat16().double()
    exact = weight.clone().requires_grad_()
    adamw = torch.optim.AdamW([exact], **GROUP)
    state = [bf16(x.repeat(copies, 1)).ravel() for x in (weight, torch.zeros(n), torch.zeros(n))]
    place = Rectangle("w", 0, 0, copies, n)
    for number in range(1, 4):
        # Larger than clipping allows, which halves it.
        gradient = torch.randn(n, generator=generator) * 2e-3
        exact.grad = gradient.double() * 0.5
        adamw.step()
        repeated = gradient.repeat(copies, 1).numpy().ravel()
        keys, values = lean_update.keys(7, number, "w"), lean_update.coefficients(GROUP, number)
        lean_update.update(state[0], state[1], state[2], repeated, 0.5, place, keys, values)
    expected = [exact.detach(), adamw.state[exact]["exp_avg"], adamw.state[exact]["exp_avg_sq"]]
    for bits, want, moves in zip(state, expected, (3e-3, None, None), strict=True):
        found = lean_update.widened(bits).reshape(copies, n).astype(np.float64)
        error, deviation = found.mean(0) - want.numpy(), found.std(0) / copies**0.5
        # The weight's step is no linear function of rounded moments: a bias far below a step of 1e-3 stays.
        slack = 1e-5 if moves else 1e-3 * np.abs(want.numpy())
        assert (np.abs(error) < 5 * deviation + slack).all()


def test_random_bits_belong_to_an_element_of_the_whole_parameter() -> None:
    """Any rectangles, as layouts and shares cut them, have the bits that the whole has there."""
    keys, numbers = lean_update.keys(7, 3, "decoder.layers.mlp.linear_fc1.weight"), random.Random(1)
    whole = [np.array(x) for x in lean_update.noise(keys, Rectangle("", 0, 0, 60, 50))]
    for _ in range(50):
        top, left = numbers.randrange(60), numbers.randrange(50)
        rows, columns = numbers.randint(1, 60 - top), numbers.randint(1, 50 - left)
        part = lean_update.noise(keys, Rectangle("", top, left, rows, columns))
        for mine, all_ in zip(part, whole, strict=True):
            assert (mine == all_[top : top + rows, left : left + columns]).all()


def test_a_long_parameter_is_updated_in_parts_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 60 * 50
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    results = []
    for chunk in (1 << 15, 170):
        monkeypatch.setattr(lean_update, "_CHUNK", chunk)
        state = [bf16(x) for x in (parts[0], parts[1], parts[2].square())]
        place, keys = Rectangle("w", 5, 9, 60, 50), lean_update.keys(7, 3, "w")
        values = lean_update.coefficients(GROUP, 3)
        lean_update.update(state[0], state[1], state[2], parts[3].numpy(), 1.0, place, keys, values)
        results.append(state)
    assert all((a == b).all() for a, b in zip(*results, strict=True))


def test_random_bits_are_even_and_those_of_another_key_row_column_or_use_are_others() -> None:
    place = Rectangle("", 0, 0, 256, 256)
    one, two = lean_update.noise(lean_update.keys(7, 1, "w"), place)
    streams = [one & np.uint32(0xFFFF), one >> np.uint32(16), two & np.uint32(0xFFFF)]
    for seed, number, name in ((8, 1, "w"), (7, 2, "w"), (7, 1, "v")):
        streams.append(lean_update.noise(lean_update.keys(seed, number, name), place)[0] & np.uint32(0xFFFF))
    even = [(s.astype(np.float64) - 32767.5) / (65536 / 12**0.5) for s in streams]
    bound = 5 / 256
    for x in even:
        assert abs(x.mean()) < bound
        # Neighbours in a row, in a column, and on a diagonal.
        for shifted in (np.roll(x, 1, 1), np.roll(x, 1, 0), np.roll(x, (1, 1), (0, 1))):
            assert abs((x * shifted).mean()) < bound
    for i, x in enumerate(even):
        assert all(abs((x * y).mean()) < bound for y in even[:i])


def test_the_bits_are_a_contract() -> None:
    """A checkpoint of an earlier version continues with the same bits. Once more in whole numbers, of a place beyond 31 bits."""

    def mixed(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ x >> shift) * factor % 2**32
        return x

    name, row, column = "embedding.word_embeddings.weight", 2**31 + 5, 70_001
    digest = hashlib.sha256(f"1234 9 {name}".encode()).digest()
    keys = [int.from_bytes(digest[n : n + 4], "little") for n in (0, 4, 8)]
    of_row = [mixed((key + row * 0x9E3779B9) % 2**32) for key in keys]
    first = mixed(mixed((of_row[0] + column * 0x9E3779B9) % 2**32) ^ of_row[1])
    one, two = lean_update.noise(lean_update.keys(1234, 9, name), Rectangle(name, row, column, 1, 1))
    assert (int(one[0, 0]), int(two[0, 0])) == (first, mixed(first ^ of_row[2]))


def test_each_update_draws_anew_and_is_clipped_once() -> None:
    """A share of 30 elements in two rectangles."""
    places = [(0, Rectangle("w", 6, 0, 2, 5)), (10, Rectangle("w", 12, 3, 4, 5))]
    weight = torch.nn.Parameter(torch.randn(30).bfloat16(), requires_grad=False)
    adamw = LeanAdamW([GROUP | {"params": [weight]}], {weight: places}, 7)
    moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    adamw.state[weight] = {"step": torch.tensor(4.0)} | moments
    state = [bf16(x) for x in (weight, *moments.values())]
    for number, factor in ((5, 0.25), (6, 1.0)):
        gradient = torch.randn(30)
        weight.decoupled_grad = gradient.clone()  # type: ignore[attr-defined]
        if factor < 1:
            adamw.factor = torch.tensor(factor)
        adamw.step()
        for taken, place in places:
            own = slice(taken, taken + place.rows * place.columns)
            numbers = lean_update.keys(7, number, "w"), lean_update.coefficients(GROUP, number)
            parts = [x[own] for x in state]
            lean_update.update(*parts, gradient.numpy()[own], factor, place, *numbers)  # type: ignore[call-arg,arg-type]
        found = [bf16(x) for x in (weight, *moments.values())]
        assert all((a == b).all() for a, b in zip(found, state, strict=True)), number
    assert adamw.factor is None
