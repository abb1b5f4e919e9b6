"""Run by test_attention.py: attention with windows, sinks and soft-capped scores against a dense mask in plain PyTorch, and by a
FlashAttention that is written out here. Leaves the largest difference of each comparison in a file."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sftd.trainer.runtime import process

process.prepare()

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from sftd.domain.model.families import FAMILIES  # noqa: E402
from sftd.domain.spec.spec import Spec  # noqa: E402
from sftd.trainer.data.batches import Batching  # noqa: E402
from sftd.trainer.data.rows import Sample  # noqa: E402
from sftd.trainer.data.sequence_layout import KeyValueCache, SequenceLayout, make_chunks  # noqa: E402
from sftd.trainer.data.sequence_shards import spans  # noqa: E402
from sftd.trainer.model import attention  # noqa: E402
from sftd.trainer.model.attention import CausalAttention  # noqa: E402
from sftd.trainer.model.kernels import attention_options  # noqa: E402
from sftd.trainer.model.quantize import mxfp4  # noqa: E402
from sftd.trainer.model.rope import RotaryEmbedding  # noqa: E402
from sftd.trainer.model.weights import Folder  # noqa: E402
from sftd.trainer.runtime.session import Layout  # noqa: E402

LENGTH, HEADS, GROUPS, DIM = 40, 4, 2, 8
ENDS = [0, 3, 27, 33, 40]
CPU = torch.device("cpu")
# Name → options of a layer: a window that ends inside a block, longer than a sample, and none.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "one": {"window": 1},
    "sinks": {"sinks": True},
    "capped": {"softcap": 0.7, "scale": 0.9},
    "all": {"window": 7, "sinks": True, "softcap": 1.5, "scale": 0.3},
}


FLASH = {name: OPTIONS[name] for name in ("window", "one", "sinks")} | {"both": {"window": 6, "sinks": True}}


def core(
    window: int | None = None, sinks: bool = False, softcap: float | None = None, scale: float | None = None
) -> CausalAttention:
    """The attention of the first layer of a model with these options, in FP64."""
    shape = SimpleNamespace(
        window=lambda layer: window if layer == 0 else None,
        score_softcap=softcap,
        attention_sinks=sinks,
        attention_scale=scale,
    )
    config: Any = SimpleNamespace(
        model_shape=shape,
        kv_channels=DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        tensor_model_parallel_size=1,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
    )
    found = CausalAttention(config, 1, None, "self")
    if found.sinks is not None:
        torch.nn.init.normal_(found.sinks, generator=torch.Generator().manual_seed(2))
    return found


def inputs(rows: int = 1) -> list[Tensor]:
    """Queries, keys and values FP64 [s, b, heads or groups, d]."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(LENGTH, rows, heads, DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def dense(core: CausalAttention, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
    """What transformers computes: one mask of all tokens, one column of scores for the sink."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = q @ k.mT * core.scale
    if core.softcap is not None:
        scores = torch.tanh(scores / core.softcap) * core.softcap
    places = torch.arange(query.shape[0])
    ago = places[:, None] - places
    sample = torch.bucketize(places, torch.tensor(ends[1:]), right=True)
    sees = (ago >= 0) & (sample[:, None] == sample)
    if core.window is not None:
        sees &= ago < core.window
    scores = scores.masked_fill(~sees, -torch.inf)
    if core.sinks is not None:
        scores = torch.cat((scores, core.sinks[:, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    shares = scores.softmax(-1)[..., : query.shape[0]]
    return (shares @ v).permute(2, 0, 1, 3).flatten(2)


def gradients(core: CausalAttention, out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
    trained = [*tensors, *core.parameters()]
    return list(torch.autograd.grad((out * weights).sum(), trained))


def layout(ends: list[int] | None = None, rank: int = 0, ranks: int = 1) -> SequenceLayout:
    chunks = None
    if ends is not None:
        chunks = make_chunks(LENGTH, ends, rank=rank, ranks=ranks, device=CPU)
    return SequenceLayout(qkv_format="sbhd", chunks=chunks, is_packed=ends is not None and len(ends) > 2)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _ends: Tensor, *_: Any, scale: float, **sizes: int
) -> tuple[Tensor, ...]:
    """`aten.flash_attention_forward` of packed tokens: output [s, heads, d] and log-sum-exp [heads, s]."""
    scores, v = flash_scores(q, k, v, ends, scale, **sizes)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v).transpose(0, 1), lse, ends, ends, ends


def flash_scores(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, window_size_left: int, window_size_right: int
) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1).transpose(0, 1) for x in (k, v))
    places = torch.arange(q.shape[0])
    ago = places[:, None] - places
    sample = torch.bucketize(places, ends[1:], right=True)
    sees = (ago >= -window_size_right) & (sample[:, None] == sample)
    if window_size_left >= 0:
        sees &= ago <= window_size_left
    return (q.transpose(0, 1) @ k.mT * scale).masked_fill(~sees, -torch.inf), v


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, _ends: Tensor, *_: Any,
    scale: float, **sizes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Its backward, from the given output and log-sum-exp as the kernel's (Dao et al. 2022, algorithm 4)."""
    scores, v = flash_scores(q, k, v, ends, scale, **sizes)
    shares, grad = (scores - lse[..., None]).exp(), grad.transpose(0, 1)
    mean = (grad * out.transpose(0, 1)).sum(-1, keepdim=True)
    d_scores = shares * (grad @ v.mT - mean) * scale
    d_query = d_scores @ k.repeat_interleave(HEADS // GROUPS, dim=1).transpose(0, 1)
    by_head = (d_scores.mT @ q.transpose(0, 1), shares.mT @ grad)
    d_key, d_value = (x.unflatten(0, (GROUPS, -1)).sum(1).transpose(0, 1) for x in by_head)
    return d_query.transpose(0, 1), d_key, d_value


def difference(core: CausalAttention, out: Tensor, expected: Tensor, tensors: list[Tensor]) -> float:
    """The largest difference of the outputs and of all gradients."""
    pairs = zip(
        [out, *gradients(core, out, tensors)], [expected, *gradients(core, expected, tensors)], strict=True
    )
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def in_rows(options: dict[str, Any], ends: list[int]) -> float:
    """Two padded rows, or packed samples."""
    is_packed = len(ends) > 2
    tensors, found = inputs(1 if is_packed else 2), core(**options)
    out = found(*tensors, None, packed_seq_params=layout(ends if is_packed else None))
    return difference(found, out, dense(found, *tensors, ends), tensors)


def in_shares(options: dict[str, Any], ends: list[int]) -> float:
    """Two context-parallel ranks in turn, with the keys and values that they would gather."""
    (query, key, value), found = inputs(), core(**options)
    attention.gather_stream = lambda *_: (key, value)
    out = torch.zeros(LENGTH, 1, HEADS * DIM, dtype=torch.float64)
    for rank in range(2):
        mine = torch.cat([torch.arange(*span) for span in spans(LENGTH, rank, 2)])
        share = found(query[mine], key[mine], value[mine], None, packed_seq_params=layout(ends, rank, 2))
        out = out.index_copy(0, mine, share)
    return difference(found, out, dense(found, query, key, value, ends), [query, key, value])


@torch.no_grad()
def cached(options: dict[str, Any]) -> float:
    """Prompts of three rows, and tokens that follow them one by one and together, among them one in whose place is padding; a row
    leaves."""
    tensors, found = inputs(3), core(**options)
    expected, cache, worst = dense(found, *tensors, [0, LENGTH]), KeyValueCache([0, 0, 0]), 0.0
    rows = [0, 1, 2]
    for counts in ((11, 3, 20), (1, 1, 1), (7, 9, 8), (2, 1), (1, 1)):
        if len(counts) < len(rows):
            cache.drop(0)
            rows = [2, 1]
        places = torch.arange(max(counts))[:, None] + torch.tensor(cache.lengths)
        # The padding has other tokens than those that are fed in its place later.
        fed = [
            x[places, rows]
            * (1 + (places - torch.tensor(cache.lengths) >= torch.tensor(counts)))[..., None, None]
            for x in tensors
        ]
        seen = layout()
        seen.cache, seen.positions = cache, places if any(cache.lengths) else places[:, 0]
        out = found(*fed, None, packed_seq_params=seen)
        for column, (row, count, before) in enumerate(zip(rows, counts, cache.lengths, strict=True)):
            difference = out[:count, column] - expected[before : before + count, row]
            worst = max(worst, float(difference.abs().max()))
        cache.advance(list(counts))
    return worst


def long_window() -> float:
    """Whether a window as long as the sequence changes a bit."""
    tensors = inputs()
    windowed, plain = (
        core(window=window)(*tensors, None, packed_seq_params=layout()) for window in (LENGTH, None)
    )
    return float(not torch.equal(windowed, plain))


def by_flash(options: dict[str, Any]) -> float:
    """What surrounds the kernel: the window's size, and the sinks' share of output, statistics and gradients."""
    kernels: Any = torch.ops.aten
    kernels._flash_attention_forward, kernels._flash_attention_backward = flash_forward, flash_backward
    attention._is_half_on_gpu = lambda x: True
    return in_rows(options, ENDS)


def rope_of_samples(scaling: dict[str, Any]) -> float:
    """Angles of packed and padded samples of which only one is long, against those of each sample alone."""
    base = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = base | {"vocab_size": 9, "max_position_embeddings": 8, "rope_parameters": scaling}
    rotary = RotaryEmbedding(FAMILIES["LlamaForCausalLM"].shape(config, {}), CPU)
    session: Any = SimpleNamespace(layout=Layout(*[1] * 5, *[0] * 4), device=CPU)
    samples = [Sample(np.ones(size, np.int64), np.ones(size, np.int64)) for size in (5, 20)]
    alone = [
        rotary(SequenceLayout(positions=torch.arange(size))).expand(2, size, 1, 8).squeeze(2)
        for size in (5, 20)
    ]
    found = []
    for is_packed in (True, False):
        sizes = {"micro_batch_size_per_gpu": 2, "use_rmpad": is_packed}
        spec = msgspec.convert({"training": sizes}, Spec)
        angles = rotary(Batching.of(spec, session).make(samples, 25).layout)
        # The second is not rotated as the first is.
        assert not torch.equal(alone[0], alone[1][:, :5])
        rows = angles[:, :, 0].split([5, 20], dim=1) if is_packed else (angles[:, :5, 0], angles[:, :20, 1])
        found += [float((a - b).abs().max()) for a, b in zip(rows, alone, strict=True)]
    return max(found)


def mxfp4_of_a_folder(where: Path) -> float:
    """An expert of a folder in MXFP4, whose blocks and scales are in different files."""
    blocks = torch.arange(3 * 4 * 2 * 16).view(3, 4, 2, 16).to(torch.uint8)
    scales = torch.arange(120, 144).view(3, 4, 2).to(torch.uint8)
    save_file({"e_blocks": blocks, "b": scales[0]}, where / "1.safetensors")
    save_file({"e_scales": scales}, where / "2.safetensors")
    with ExitStack() as stack:
        folder = Folder(str(where), stack, ["1.safetensors", "2.safetensors"])
        assert (folder.names, folder.rows("e")) == ({"e", "b"}, 3)
        found = folder.read_rows("e", 1, 2)
    return float(not torch.equal(found, mxfp4.values(blocks, scales)[1:2]))


def main(path: str) -> None:
    attention_options._BLOCK = 16
    found = {"long window": long_window()}
    for name, options in OPTIONS.items():
        for rows, ends in (("padded", [0, LENGTH]), ("packed", ENDS)):
            found[f"{name} {rows}"] = in_rows(options, ends)
            found[f"{name} {rows} cp2"] = in_shares(options, ends)
        found[f"{name} cached"] = cached(options)
    found["mxfp4"] = mxfp4_of_a_folder(Path(path).parent)
    short, long = ([1.0 + step * pair for pair in range(8)] for step in (0.1, 2.0))
    found["longrope"] = rope_of_samples(
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 8,
            "short_factor": short,
            "long_factor": long,
        }
    )
    found["dynamic"] = rope_of_samples({"rope_type": "dynamic", "factor": 3.0})
    # Last, because it replaces the kernels.
    found |= {f"{name} flash": by_flash(options) for name, options in FLASH.items()}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
