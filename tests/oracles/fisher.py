"""A Fisher pass by transformers and one autograd graph of the whole model: what `quantkit sensitivity` computes layer
by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass
class WholeModel:
    """``outputs``: linear (experts by number, gate and up apart) -> gradients of its outputs (n, out), one row for each
    token that it saw; ``residual``: (layer, sublayer) -> (rows, tokens, hidden) at the sublayer's output."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def fisher(folder: Path, tokens: Tensor, seed: int) -> WholeModel:
    """The gradients of the summed cross-entropy of one sampled label for each position. tokens (rows, tokens)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    found = WholeModel()
    _watch_residual(_layers(model), found)
    with _Linears(model, found):
        logits = model(tokens).logits
    labels = sampled(logits.detach(), seed)
    functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    return found


def sampled(logits: Tensor, seed: int) -> Tensor:
    """logits (rows, tokens, vocab) -> labels (rows * tokens,): the first token whose cumulated probability exceeds the
    position's uniform number."""
    drawn = torch.rand(logits[..., 0].numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cumulated = logits.flatten(0, 1).double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, (drawn * (1 - 1e-5)).unsqueeze(1), right=True).squeeze(1)


def _layers(model: Any) -> Any:
    return (model.model.language_model if hasattr(model.model, "language_model") else model.model).layers


def _watch_residual(layers: Any, found: WholeModel) -> None:
    def keep(layer: int, number: int) -> Callable[[Tensor], None]:
        return lambda gradient: found.residual.__setitem__((layer, number), gradient.clone())

    for number, layer in enumerate(layers):

        def after_attention(module: Any, given: Any, number: int = number) -> None:
            given[0].register_hook(keep(number, 0))

        def after_layer(module: Any, given: Any, out: Any, number: int = number) -> None:
            (out[0] if isinstance(out, tuple) else out).register_hook(keep(number, 1))

        layer.post_attention_layernorm.register_forward_pre_hook(after_attention)
        layer.register_forward_hook(after_layer)


class _Linears(TorchFunctionMode):
    """Hooks onto the outputs of all products with a weight of the decoder layers."""

    def __init__(self, model: Any, found: WholeModel) -> None:
        super().__init__()
        self._named = {p.data_ptr(): (name, p) for name, p in model.named_parameters() if ".layers." in name}
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is functional.linear:
            for start, (name, parameter) in self._named.items():
                place = args[1].data_ptr() - start
                if 0 <= place < parameter.nbytes and out.requires_grad:
                    out.register_hook(self._keep(name, place // parameter[0].nbytes))
        return out

    def _keep(self, name: str, first: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1]).clone()
            stem, _, last = name.rpartition("experts.")
            if last == "gate_up_proj":
                gate, up = flat.chunk(2, dim=-1)
                self._found.outputs[f"{stem}experts.{first}.gate_proj.weight"] = gate
                self._found.outputs[f"{stem}experts.{first}.up_proj.weight"] = up
            elif last == "down_proj":
                self._found.outputs[f"{stem}experts.{first}.down_proj.weight"] = flat
            else:
                self._found.outputs[name] = flat

        return keep
