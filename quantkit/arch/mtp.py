"""What a layer for multi-token prediction computes around its decoder layer (arXiv 2412.19437, section 2.2). Plans ask
which layers these are, so torch is imported where something is computed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantkit.arch.base import MtpLayer

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.arch.base import Weights


SHARED_NORM = "shared_head.norm"


def mtp_layer(prefix: str, eps: float, last_norm: str = SHARED_NORM) -> MtpLayer:
    """DeepSeek's, whose tensors begin with ``prefix``; ``eps`` of its norms; ``last_norm``: the one before the head."""
    return MtpLayer(
        embed=f"{prefix}embed_tokens.weight",
        lm_head=f"{prefix}shared_head.head.weight",
        inputs=partial(_inputs, prefix, eps),
        final_hidden=partial(_final_hidden, f"{prefix}{last_norm}.weight", eps),
    )


def _inputs(prefix: str, eps: float, weights: Weights, hidden: Tensor, embeddings: Tensor) -> Tensor:
    import torch

    from quantkit.arch.ops import linear, rms_norm

    embedded = rms_norm(embeddings, weights(f"{prefix}enorm.weight"), eps)
    previous = rms_norm(hidden, weights(f"{prefix}hnorm.weight"), eps)
    return linear(torch.cat((embedded, previous), dim=-1), weights(f"{prefix}eh_proj.weight"))


def _final_hidden(norm: str, eps: float, weights: Weights, x: Tensor) -> Tensor:
    from quantkit.arch.ops import rms_norm

    return rms_norm(x, weights(norm), eps)
