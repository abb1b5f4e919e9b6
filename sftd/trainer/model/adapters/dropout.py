"""Dropout of the adapters' inputs. Its mask is a function of the run's seed, the sample's place in the endless sample order (and with it
the step), the token's position in the sample, the product and the column, so that no layout and no resume changes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sftd.trainer.data.token_keys import TokenKeys


@dataclass(frozen=True)
class Dropout:
    """Dropout of one product's input.

    share: probability of a 0. product: key of the product, the same in every layout. first_column: of this rank's columns in the whole
    input. part: this rank's (index, number) of equal parts of the sequence, with sequence parallelism.
    """

    share: float
    product: int
    first_column: int
    part: tuple[int, int]
    tokens: TokenKeys

    def keys(self) -> Tensor | None:
        """Keys of the rows of the input, flattened; None where nothing is dropped."""
        if self.tokens.current is None:
            return None
        index, count = self.part
        return self.tokens.current.chunk(count)[index].flatten()

    def apply(self, x: Tensor, keys: Tensor) -> Tensor:
        """x [n, in] ÷ (1 − share) where the mask is 1, else 0. keys: int64 [n]."""
        if x.is_cuda:
            from sftd.trainer.model.kernels.dropout import dropped

            return dropped(
                x, keys, self.product, self.first_column, threshold(self.share), 1 / (1 - self.share)
            )
        columns = torch.arange(self.first_column, self.first_column + x.shape[1], device=x.device)
        bits = mix(keys[:, None] ^ mix(columns ^ self.product))
        return torch.where(bits >= threshold(self.share), x / (1 - self.share), 0.0)


def threshold(share: float) -> int:
    """The 32-bit number below which a hash means 0."""
    return int(share * 2**32)


def product_key(name: str) -> int:
    """Key of the product whose weight has this name in the Hugging Face folder: below 2^31."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") >> 1


def mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby 2011) of int64 values below 2^32."""
    low: Any = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)
