"""Checkpoints whose "quantised" linears are float32 weights under their own names: what folding alone does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from quantkit.formats import layouts
from quantkit.formats.folder import FolderLayout, FolderReader
from quantkit.formats.planned import PlannedTensor
from quantkit.quantizers.batch import QuantizedBatch
from quantkit.schemes import IntScheme, QuantizedTensor, Scheme
from quantkit.tensors import TensorInfo


def kept(
    weight: Tensor, scheme: Any, *, reach: Tensor | None = None, output_factor: Any = None, to_residual: bool = False
) -> QuantizedBatch:
    """The weight itself in place of codes."""
    rows = weight.new_zeros(weight.shape[:2])
    return QuantizedBatch(scheme, {"codes": weight.clone(), "scale": rows[..., None]}, rows, rows, ("",) * len(weight))


def _check(name: str, shape: tuple[int, ...], scheme: Scheme) -> None: ...


def _stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    return (TensorInfo(tensor.name, tensor.info.shape, "F32"),)


def _pack(tensor: QuantizedTensor) -> Mapping[str, Tensor]:
    return {tensor.name: tensor.stored["codes"]}


def _nothing(planned: Sequence[PlannedTensor]) -> Any:
    return {}


PLAIN = FolderLayout(FolderReader("plain", lambda raw, section: {}), _check, _stored, _pack, _nothing, lambda _: [])


def write_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are written in this layout, and the streams compute with its weights, if `kept` is their quantiser."""
    monkeypatch.setitem(layouts.LAYOUTS, "compressed-tensors", PLAIN)  # pyright: ignore[reportArgumentType]
    decode = IntScheme.decode

    def either(scheme: IntScheme, codes: Tensor, *stored: Tensor, **named: Tensor) -> Tensor:
        return codes if codes.is_floating_point() else decode(scheme, codes, *stored, **named)

    monkeypatch.setattr(IntScheme, "decode", either)


def decoded_plainly(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of plain safetensors."""
    from safetensors.torch import load_file

    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}
