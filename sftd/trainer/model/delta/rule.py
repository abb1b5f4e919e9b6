"""The gated delta rule in chunks, and the operations around it, in PyTorch and FP32. Autograd computes its backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sftd.trainer.model.delta.segments import Chunks


def convolve(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """silu of a causal convolution of each channel: x [s, b, c], weight [c, k], positions int64 [s] of the tokens in their samples →
    FP32 [s, b, c]. A tap before a sample's first token is zero."""
    taps, found = weight.float().unbind(1), torch.zeros_like(x, dtype=torch.float32)
    for back, tap in enumerate(reversed(taps)):
        before = F.pad(x, (0, 0, 0, 0, back, 0))[: x.shape[0]]
        before = torch.where((positions >= back)[:, None, None], before, 0)
        found = found + before.float() * tap
    return F.silu(found)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) · weight · silu(gate)` over the last dimension, in FP32."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps) * F.silu(gate.float())


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, chunks: Chunks) -> Tensor:
    """For each token of a sample, in FP32: `S ← exp(decay) S`, `S ← S + k ⊗ β (v − Sᵀ k)`, output `Sᵀ q`, with S = 0 before its first.

    q, k [n, key heads, d], made unit vectors here, and q divided by √d; v [n, value heads, e], decay ≤ 0 and beta [n, value heads]
    → [n, value heads, e]. A key head serves consecutive value heads. S [d, e].

    In a chunk (Yang et al. 2025, section 3.3), with G the sum of decays up to a token and D[i, j] = exp(G[i] − G[j]), what the tokens
    write are the rows of the solution of (1 + tril(β k kᵀ · D, −1)) X = β (v − exp(G) k S): X = U − W S for all chunks at once, and
    only S goes from chunk to chunk.
    """
    groups = k.shape[1]
    # [chunks, key heads, value heads of a key head, CHUNK, …]
    q, k = (_unit(chunks.split(x.float())).transpose(1, 2).unsqueeze(2) for x in (q, k))
    v, decay, beta = (
        chunks.split(x.float()).unflatten(2, (groups, -1)).movedim(1, 3) for x in (v, decay, beta)
    )
    q, beta = q * q.shape[-1] ** -0.5, beta.unsqueeze(-1)
    upper = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    # A sum up to each token. CUDA's cumsum does not repeat its bits.
    total = torch.where(upper, 0, decay.unsqueeze(-2)).sum(-1)
    # Exponents above the diagonal are positive and may overflow.
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(upper, float("-inf")).exp()
    since, until = total.exp().unsqueeze(-1), (total[..., -1:] - total).exp().unsqueeze(-1)
    sides = torch.cat((v * beta, k * (beta * since)), dim=-1)
    # The solver reads below the diagonal only, and takes ones on it.
    written = torch.linalg.solve_triangular(
        (k @ k.mT) * between * beta, sides, upper=False, unitriangular=True
    )
    parts = written.split((v.shape[-1], k.shape[-1]), dim=-1)
    # [chunks, key heads, value heads of a key head, CHUNK, …], cut into steps
    by_step = [
        x.split(chunks.active)
        for x in (*parts, q * since, (q @ k.mT) * between, k * until, since[..., -1:, :])
    ]
    state: Tensor | None = None
    outs = []
    for new, erased, reading, inside, writing, kept in zip(*by_step, strict=True):
        if state is None:
            outs.append(inside @ new)
            state = writing.mT @ new
            continue
        state = state[: new.shape[0]]
        corrected = new - erased @ state
        outs.append(reading @ state + inside @ corrected)
        state = kept * state + writing.mT @ corrected
    return chunks.join(torch.cat(outs).movedim(3, 1).flatten(2, 3))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
