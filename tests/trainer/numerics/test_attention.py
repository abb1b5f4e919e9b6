"""Attention with windows, sinks and soft-capped scores is that of a dense mask in plain PyTorch: padded, packed, in the shares of
context-parallel ranks, with a key-value cache, and around FlashAttention; outputs and gradients, in FP64. RoPE that depends on the length is that of each
sample alone. An expert in MXFP4 is read from its blocks and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.builders.paths import RANKS

if TYPE_CHECKING:
    from tests.builders.warm_ranks import WarmTrainer

SCRIPT = RANKS / "attention_ranks.py"


def test_attention_is_that_of_a_dense_mask(warm: WarmTrainer, tmp_path: Path) -> None:
    out, log = tmp_path / "found.json", tmp_path / "log"
    assert warm.script(SCRIPT, [str(out)], 1, log).wait() == [0], log.read_text()
    found = json.loads(out.read_text())
    assert len(found) == 33
    assert {name: difference for name, difference in found.items() if not difference < 1e-6} == {}
