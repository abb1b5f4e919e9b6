"""`model.freeze`: which weights of a model folder are not trained. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Modules that the trainer computes in one product, whose weights are one parameter.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def frozen(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names of weights in which one of the regular expressions matches, anywhere."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if any(pattern.search(name) for pattern in compiled)]


def parts_of_products(chosen: Sequence[str], names: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """(frozen, trained) weights of each parameter of which only a part is frozen. `chosen` are the frozen ones of `names`."""
    products: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        above, _, kind = name.rpartition(".")
        layer, _, module = above.rpartition(".")
        for fused in _FUSED:
            if module in fused:
                products.setdefault((layer, fused[0], kind), []).append(name)
    is_frozen = set(chosen)
    split = [
        ([n for n in one if n in is_frozen], [n for n in one if n not in is_frozen])
        for one in products.values()
    ]
    return [(inside, outside) for inside, outside in split if inside and outside]
