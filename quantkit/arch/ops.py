"""The small operations that families share, on the device of the input; only `rotate_heads_` writes to its argument.

Angles and routing are float32. A linear computes in the precision of its weight: float32, or bfloat16 where the caller
hands such weights out, as runtimes do; a norm gives its result in it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.arch.rope import Rope
from quantkit.kernels.backend import Backend


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) @ weight (out, in)^T, in the weight's dtype."""
    return functional.linear(x.to(weight.dtype), weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., n) / sqrt(mean(x^2) + eps) * weight (n,), arXiv 1910.07467: computed in float32, on a GPU given in the
    weight's dtype. Autograd goes through it."""
    if Backend.of(x.device) is Backend.TRITON and not (x.requires_grad or weight.requires_grad):
        from quantkit.kernels.triton import norm as norm_triton

        if x.shape[-1] <= norm_triton.WIDEST:
            return norm_triton.rms_norm(x, weight, eps)
    x = x.float()
    if x.is_cuda:
        return functional.rms_norm(x, weight.shape, weight.float(), eps).to(weight.dtype)
    # On a CPU one reduction and one pass are twice as fast as torch's own rms_norm, which makes a copy for every step.
    # The length itself stays: autograd needs it.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.rsqrt(length.square().div_(x.shape[-1]).add_(eps))).mul_(weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, same shapes: the hidden of a gated MLP (arXiv 2002.05202)."""
    return functional.silu(gate).mul_(up)


def rope_rotation(rope: Rope, n_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (n_tokens, dim / 2) float32, of positions 0, 1...; times yarn's attention factor.

    Rounds where transformers rounds (frequencies and angles in float32), since at position 2000 an angle's last bit is
    visible in logits.
    """
    steps = torch.arange(0, rope.dim, 2, device=device).float() / rope.dim
    periods = rope.theta**steps
    frequencies = 1.0 / periods
    if rope.linear is not None:
        frequencies /= rope.linear.factor
    if rope.llama3 is not None:
        frequencies /= torch.tensor(rope.llama3.divisors(rope.dim, rope.theta), device=device)
    if rope.yarn is not None:
        low, high = rope.yarn_ramp(rope.yarn)
        ramp = ((torch.arange(rope.dim // 2, device=device).float() - low) / (high - low)).clamp(0, 1)
        stretched = 1.0 / (rope.yarn.factor * periods)
        # 1 - (1 - ramp) and not ramp: the reference rounds it so.
        keep = 1 - ramp
        frequencies = stretched * (1 - keep) + frequencies * keep
    angles = torch.arange(n_tokens, device=device).float()[:, None] * frequencies
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., dim) with cos, sin broadcastable to (..., dim / 2) -> rotated pairs, first halves then second halves.

    The order of the output differs from the interleaved input; scores don't change when queries and keys share it.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_heads_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """`rotate` in place: x (rows, tokens, heads, dim) of any float dtype, a slice of a contiguous tensor's last
    dimension; cos, sin (tokens, dim / 2) float32."""
    if Backend.of(x.device) is Backend.TRITON and not x.requires_grad:
        from quantkit.kernels.triton import norm as norm_triton

        norm_triton.rotate_(x, cos, sin, interleaved)
    else:
        x.copy_(rotate(x, cos[:, None], sin[:, None], interleaved))
