"""One update of the lean optimizer, defined with NumPy on a CPU; `lean_kernel` computes the same bits on a GPU.

Weights and moments are BF16 and rounded stochastically (Gupta et al. 2015): up with the probability that makes the mean exact,
so that updates below half a BF16 step are not lost. The random bits are a hash of the seed, the update's number, the
parameter's name and the element's row and column in the whole parameter, so they depend neither on the layout nor on what ran
before.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Elements that are computed at a time: they stay in the cache.
_CHUNK = 1 << 15
_GOLDEN = 0x9E3779B9
_EXPONENT = 0x7F800000

Words = NDArray[np.uint32]


class Rectangle(NamedTuple):
    """A rectangle of a parameter: its upper left element in the whole parameter, taken as a matrix of the length of its last
    dimension, and its sides. `name` is the parameter's key in a checkpoint."""

    name: str
    row: int
    column: int
    rows: int
    columns: int


class Coefficients(NamedTuple):
    """AdamW's numbers for one update, each rounded to FP32 when it is used.

    `keep` is 1 - lr · weight decay; `rate` is lr ÷ (1 - beta1^n), `unbias` is 1 ÷ √(1 - beta2^n) for the n-th update.
    """

    keep: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    unbias: float
    eps: float
    rate: float


def coefficients(group: dict[str, Any], number: int) -> Coefficients:
    """The numbers of update `number` (from 1) for a parameter group of torch's AdamW."""
    beta1, beta2 = group["betas"]
    return Coefficients(
        keep=1 - group["lr"] * group["weight_decay"],
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        unbias=1 / math.sqrt(1 - beta2**number),
        eps=group["eps"],
        rate=group["lr"] / (1 - beta1**number),
    )


def keys(seed: int, number: int, name: str) -> tuple[int, int, int]:
    """Three 32-bit keys of a parameter's random bits in update `number`."""
    digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    first, second, third = struct.unpack_from("<3I", digest)
    return first, second, third


def noise(three: tuple[int, int, int], place: Rectangle) -> tuple[Words, Words]:
    """Random bits of each element of `place`: two uint32 [rows, columns]. The first has 16 bits for the weight (low) and 16 for
    the first moment, the second has 16 (low) for the second moment."""
    rows = np.arange(place.row, place.row + place.rows, dtype=np.uint32)[:, None] * np.uint32(_GOLDEN)
    columns = np.arange(place.column, place.column + place.columns, dtype=np.uint32) * np.uint32(_GOLDEN)
    first, second, third = (_mix(rows + np.uint32(key)) for key in three)
    one = _mix(_mix(first + columns) ^ second)
    return one, _mix(one ^ third)


def update(
    weight: NDArray[np.uint16],
    first: NDArray[np.uint16],
    second: NDArray[np.uint16],
    gradient: NDArray[np.float32],
    factor: float,
    place: Rectangle,
    three: tuple[int, int, int],
    s: Coefficients,
) -> None:
    """Update, in place, BF16 weight and moments, given by their bits, [rows · columns] each, from an FP32 gradient times
    `factor`. Each operation is rounded to FP32 once."""
    step = max(1, _CHUNK // place.columns)
    with np.errstate(all="ignore"):
        for top in range(0, place.rows, step):
            rows = min(step, place.rows - top)
            part = slice(top * place.columns, (top + rows) * place.columns)
            bits = noise(three, place._replace(row=place.row + top, rows=rows))
            g = gradient[part] * np.float32(factor)
            _update(weight[part], first[part], second[part], g, bits[0].ravel(), bits[1].ravel(), s)


def _update(
    weight: NDArray[np.uint16],
    first: NDArray[np.uint16],
    second: NDArray[np.uint16],
    g: NDArray[np.float32],
    one: Words,
    two: Words,
    s: Coefficients,
) -> None:
    m = widened(first) * np.float32(s.beta1) + g * np.float32(s.rest1)
    v = widened(second) * np.float32(s.beta2) + g * g * np.float32(s.rest2)
    step = m / (np.sqrt(v) * np.float32(s.unbias) + np.float32(s.eps))
    w = widened(weight) * np.float32(s.keep) - step * np.float32(s.rate)
    low = np.uint32(0xFFFF)
    weight[...] = rounded(w, one & low)
    first[...] = rounded(m, one >> np.uint32(16))
    second[...] = rounded(v, two & low)


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """FP32 values of BF16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: NDArray[np.float32], random: Words) -> NDArray[np.uint16]:
    """BF16 bits of FP32 values: one of the two neighbours, the farther one if the 16 bits `random` overflow with the bits that
    are cut off. Infinities and NaNs stay."""
    bits = x.view(np.uint32)
    if not np.isfinite(x).all():
        random = np.where(bits & _EXPONENT == _EXPONENT, np.uint32(0), random)
    return ((bits + random) >> 16).astype(np.uint16)


def _mix(x: Words) -> Words:
    """A bijection of 32 bits in which each bit of the input changes each of the output with probability ½ (lowbias32, Wellons
    2018). Overwrites `x`."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x *= np.uint32(factor)
    x ^= x >> 16
    return x
