"""Keys of the tokens in the sample order, for dropout."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from sftd.trainer.data.rows import Ints


def token_keys(seed: int, place: int, length: int) -> Ints:
    """Keys of a sample's tokens: int64 [length], below 2^32. `place`: the sample's place in the sample order."""
    base = hashlib.sha256(f"{seed} {place}".encode()).digest()
    with np.errstate(over="ignore"):
        mixed = (np.arange(length, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= np.uint64(int.from_bytes(base[:8], "little"))
        # The finaliser of SplitMix64 (Steele et al. 2014).
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(32)).astype(np.int64)


class TokenKeys:
    """The keys of the micro-batch in a model's current layer, int64 [s, b]; None outside training."""

    current: Tensor | None = None
