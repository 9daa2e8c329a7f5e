"""compressed-tensors checkpoints: what is stored for each planned tensor, and the sink that writes it.

A linear ``P.weight`` (out, in) on an integer grid is stored as ``pack-quantized``:

    P.weight_packed      int32 (out, ceil(in * bits / 32))     codes, `bitpack`
    P.weight_scale       bf16/f16/f32 (out, groups)            the scale that is served
    P.weight_zero_point  int32 (ceil(out * bits / 32), groups) only if asymmetric; packed along out
    P.weight_shape       int64 (2,)                            out, in

kept FP8 blocks as ``float-quantized`` (P.weight F8_E4M3, P.weight_scale F32 (out blocks, in blocks)); all else under
its own name. compressed-tensors counts codes from -2**(bits-1), quantkit from 0; both offsets cancel in (code -
zero_point), and the packed bits are the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import OutputError, SchemeError
from quantkit.formats.bitpack import n_words, pack
from quantkit.formats.casting import bytes_of, cast_to
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.writer import MAX_SHARD_BYTES, ShardWriter, layout_shards
from quantkit.schemes import Float8Scheme, GgmlScheme, IntScheme, QuantizedTensor
from quantkit.tensors import DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SCALE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""A scheme's scale_dtype -> safetensors dtype."""


def stored(tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
    """Every tensor that the file holds for a planned one: names, shapes, dtypes, and so the exact bytes."""
    match tensor.scheme:
        case None:
            return (tensor.kept_info,)
        case IntScheme() as scheme:
            return _stored_int(tensor, scheme)
        case Float8Scheme() as scheme:
            scale_shape = scheme.scale_shape(tensor.info.shape)
            return (
                TensorInfo(tensor.name, tensor.info.shape, "F8_E4M3"),
                TensorInfo(f"{tensor.module}.weight_scale", scale_shape, "F32"),
            )
        case GgmlScheme():
            raise AssertionError(f"{tensor.name}: the plan admits no block types of ggml here")


def _stored_int(tensor: PlannedTensor, scheme: IntScheme) -> tuple[TensorInfo, ...]:
    out_features, in_features = tensor.info.shape
    n_groups, prefix = scheme.n_groups(in_features), f"{tensor.module}.weight"
    infos = [
        TensorInfo(f"{prefix}_packed", (out_features, n_words(in_features, scheme.bits)), "I32"),
        TensorInfo(f"{prefix}_scale", (out_features, n_groups), SCALE_DTYPES[scheme.scale_dtype]),
        TensorInfo(f"{prefix}_shape", (2,), "I64"),
    ]
    if not scheme.symmetric:
        infos.append(TensorInfo(f"{prefix}_zero_point", (n_words(out_features, scheme.bits), n_groups), "I32"))
    return tuple(infos)


class CompressedTensorsSink:
    """A checkpoint being written. Every tensor's place is known when it is opened, so tensors come in any order and may
    come again; the bytes of the files do not depend on the order. Nothing is held in memory but the tensor being
    written."""

    def __init__(self, writer: ShardWriter, planned: Sequence[PlannedTensor]) -> None:
        self._writer = writer
        self._planned = {tensor.name: tensor for tensor in planned}

    @classmethod
    def open(
        cls, directory: Path, planned: Sequence[PlannedTensor], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> CompressedTensorsSink:
        """Create the shards in full size in ``directory``, or take up those of an interrupted job (`fresh` tells
        which).

        Raises `OutputError` if the disk is too full, or if files are there that this plan would not have made.
        """
        layout = layout_shards((stored(tensor) for tensor in planned), max_shard_bytes)
        return cls(ShardWriter.open(directory, layout), planned)

    @property
    def fresh(self) -> bool:
        """True if the files were created by this `open`: a journal that says tensors are written is then not theirs."""
        return self._writer.fresh

    @property
    def nbytes(self) -> int:
        """Size of all shards, headers included."""
        return self._writer.nbytes

    def write(self, tensor: QuantizedTensor, start_row: int = 0) -> None:
        """Store a quantised linear, always whole. Raises `SchemeError` for a scale that is not finite, `OutputError`
        for a full disk."""
        assert start_row == 0, f"{tensor.name}: packed zero points of rows cannot be stored alone"
        planned = self._planned[tensor.name]
        scheme = planned.scheme
        assert scheme == tensor.scheme, f"{tensor.name}: planned {scheme}, got {tensor.scheme}"
        codes, scale, zero_point = (tensor.stored.get(key) for key in ("codes", "scale", "zero_point"))
        assert codes is not None, f"{tensor.name}: a scheme that compressed-tensors lacks"
        assert scale is not None, f"{tensor.name}: a scheme that compressed-tensors lacks"
        assert tuple(codes.shape) == planned.info.shape, f"{tensor.name}: codes are {list(codes.shape)}"
        _check_scale(tensor.name, scale)
        prefix = f"{planned.module}.weight"
        if isinstance(scheme, Float8Scheme):
            self._put(tensor.name, codes)
            self._put(f"{prefix}_scale", scale.float())  # exact, whatever float the source stores scales in
            return
        assert isinstance(scheme, IntScheme)
        assert scheme.symmetric == (zero_point is None), f"{tensor.name}: zero points do not fit the scheme"
        self._put(f"{prefix}_packed", pack(codes, scheme.bits))
        self._put(f"{prefix}_scale", scale)
        if zero_point is not None:
            self._put(f"{prefix}_zero_point", pack(zero_point.T.contiguous(), scheme.bits).T)
        # Last, because it doubles as the mark that this linear was written: a shape is never zero.
        self._writer.write(f"{prefix}_shape", 0, struct.pack("<2q", *planned.info.shape))

    def write_kept(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Store rows ``[start_row, start_row + len(tensor))`` of a kept tensor, cast to its planned dtype (round to
        nearest even).

        Raises `SchemeError` if a finite value would become infinite, `OutputError` for a full disk.
        """
        info = self._planned[name].kept_info
        assert tuple(tensor.shape[1:]) == info.shape[1:], f"{name}: rows of {list(tensor.shape[1:])}"
        assert start_row + (len(tensor) if tensor.ndim else 1) <= (info.shape[0] if info.shape else 1), (
            f"{name}: too many rows"
        )
        cast = cast_to(name, tensor, info.dtype)
        row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
        self._writer.write(name, start_row * row_bytes, bytes_of(cast))

    def wants_importance(self, name: str) -> bool:
        """The format has no place for it."""
        return False

    def write_importance(self, name: str, importance: Tensor, n_tokens: Sequence[int]) -> None:
        """See `wants_importance`."""
        raise AssertionError(f"{name}: compressed-tensors has no place for importance")

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        self._writer.sync()

    def finish(self) -> dict[str, str]:
        """Write the index (if there are several shards or not, runtimes read both), sync, and return file name ->
        sha256 (hex).

        Raises `OutputError` if an integer linear of the plan was never written.
        """
        self._refuse_unwritten()
        return self._writer.finish()

    def close(self) -> None:
        """Sync and give the file descriptors back, without finishing: an interrupted job."""
        self._writer.sync()

    def _put(self, name: str, tensor: Tensor) -> None:
        info = self._writer.info(name)
        assert tuple(tensor.shape) == info.shape, f"{name}: planned {list(info.shape)}, got {list(tensor.shape)}"
        assert str(tensor.dtype) == f"torch.{DTYPES[info.dtype][1]}", (
            f"{name}: planned {info.dtype}, got {tensor.dtype}"
        )
        self._writer.write(name, 0, bytes_of(tensor))

    def _refuse_unwritten(self) -> None:
        missing = [name for name in self._int_linears() if not any(self._writer.read(f"{name}_shape"))]
        if missing:
            raise OutputError(
                f"{self._writer.directory}: {missing[0]} and {len(missing) - 1:,} other linears were never written.",
                hint="The journal and the files disagree: start again with --restart.",
            )

    def _int_linears(self) -> Iterable[str]:
        return (tensor.name for tensor in self._planned.values() if isinstance(tensor.scheme, IntScheme))


def _check_scale(name: str, scale: Tensor) -> None:
    import torch

    if not torch.isfinite(scale).all():
        raise SchemeError(
            f"{name}: a scale is NaN or infinite.",
            hint="The weight or its Hessian holds values that are no numbers.",
        )
