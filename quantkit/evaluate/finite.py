"""Numbers that are not finite are refused where they first appear: whatever is computed of them is NaN, and an
evaluation that says so would say nothing else.

The tensors are only looked through when a hidden state or a score is not finite.
"""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

from torch import Tensor

from quantkit.arch.base import ModelArch
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.stream import row_batches
from quantkit.errors import EvaluationError
from quantkit.tensors import Role

if TYPE_CHECKING:
    from quantkit.arch.base import Weights


def check_hidden(name: str, arch: ModelArch, weights: Weights, x: RowStore, layer: int | None) -> None:
    """Raise `EvaluationError` if a hidden state of the model ``name`` is not finite after ``layer`` (None: after the
    embedding). x (rows, tokens, hidden)."""
    for start, stop in row_batches(x):
        found = _first(x.read(start, stop).isfinite().all(-1))
        if found is not None:
            after = f"layer {layer}" if layer is not None else f"the embedding ({arch.embed})"
            what = f"hidden states are not finite after {after}"
            raise _refusal(name, what, (start + found[0], found[1]), _culprit(arch, weights, layer))


def check_losses(name: str, arch: ModelArch, weights: Weights, losses: Tensor, start: tuple[int, int]) -> None:
    """Raise `EvaluationError` if the loss of a token is not finite: hidden states were, so logits are not. losses
    (rows, scored), the first of them at ``start`` = (row, position)."""
    found = _first(losses.isfinite())
    if found is not None:
        what = f"logits are not finite, though the hidden states after the last layer are (see {arch.lm_head})"
        raise _refusal(name, what, (start[0] + found[0], start[1] + found[1]), _culprit(arch, weights, None))


def _first(finite: Tensor) -> tuple[int, int] | None:
    """Row and token of the first False in (rows, tokens)."""
    if bool(finite.all()):
        return None
    row, token = (~finite).nonzero()[0].tolist()
    return row, token


def _culprit(arch: ModelArch, weights: Weights, layer: int | None) -> tuple[str, float]:
    """The tensor of the layer that has the largest value, NaN being the largest, and that value. The matrices of the
    vocabulary, which may be larger than memory, are not looked through."""
    skipped = (Role.MTP, Role.EMBED, Role.LM_HEAD)
    names = [spec.name for spec in arch.tensors() if spec.layer == layer and spec.role not in skipped]
    sizes = {name: float(weights(name).abs().max()) for name in names}
    return max(sizes.items(), key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1], default=("", 0.0))


def _refusal(name: str, what: str, place: tuple[int, int], culprit: tuple[str, float]) -> EvaluationError:
    (row, token), (tensor, largest) = place, culprit
    cause = f"; the largest weight there is {largest:.3g}, in {tensor}" if tensor else ""
    return EvaluationError(
        f"{name}: {what}, first at window {row}, token {token}{cause}. Nothing was evaluated.",
        hint=f"Weights, or scales, are damaged or overflow: `quantkit verify {shlex.quote(name)} --source ORIGINAL` "
        "compares them; fetch or convert the checkpoint again.",
    )
