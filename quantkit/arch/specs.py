"""Tensors that families have alike: gated MLPs, and what an MTP layer has beside its decoder layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from quantkit.arch.base import MlpNames
from quantkit.arch.mtp import SHARED_NORM
from quantkit.tensors import Projection, Role, TensorSpec


def mlp_specs(
    prefix: str, names: MlpNames, sizes: tuple[int, int], role: Role, layer: int, expert: int | None = None
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """Gate, up and down of the MLP whose tensors start with ``prefix``; ``sizes``: (hidden, width)."""
    hidden, width = sizes
    fused = "gate_up_proj" if expert is None else None  # vLLM's routed experts are no modules of their own

    def linear(name: str, projection: Projection, shape: tuple[int, int], fused: str | None = None) -> TensorSpec:
        name = f"{prefix}{name}.weight"
        return TensorSpec(name, shape, role, layer, expert, projection, linear=True, fused=fused)

    return (
        linear(names.gate, Projection.GATE, (width, hidden), fused),
        linear(names.up, Projection.UP, (width, hidden), fused),
        linear(names.down, Projection.DOWN, (hidden, width)),
    )


def mtp_specs(
    prefix: str, table: tuple[int, int], layer: int, inner: Iterable[TensorSpec], last_norm: str = SHARED_NORM
) -> Iterator[TensorSpec]:
    """An MTP layer of DeepSeek's kind (`mtp.mtp_layer`): ``inner``, its decoder layer, and what joins it to the model.
    ``table``: (vocabulary, hidden); ``last_norm``: name of the norm before the head."""
    hidden = table[1]
    for spec in inner:
        yield replace(spec, role=Role.MTP, mtp_role=spec.role)
    embed, norm, head = Role.EMBED, Role.NORM, Role.LM_HEAD
    yield TensorSpec(f"{prefix}embed_tokens.weight", table, Role.MTP, layer, table=True, mtp_role=embed)
    yield TensorSpec(f"{prefix}enorm.weight", (hidden,), Role.MTP, layer, mtp_role=norm)
    yield TensorSpec(f"{prefix}hnorm.weight", (hidden,), Role.MTP, layer, mtp_role=norm)
    yield TensorSpec(
        f"{prefix}eh_proj.weight",
        (hidden, 2 * hidden),
        Role.MTP,
        layer,
        projection=Projection.MTP_INPUT,
        table=True,
    )
    yield TensorSpec(f"{prefix}{last_norm}.weight", (hidden,), Role.MTP, layer, mtp_role=norm)
    yield TensorSpec(f"{prefix}shared_head.head.weight", table, Role.MTP, layer, table=True, mtp_role=head)
