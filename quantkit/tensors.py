"""The values that travel through quantkit: what a tensor is before it is read, and what it is after it was quantised.

``torch`` is imported only for type checking here: ``quantkit plan`` and ``quantkit inspect`` never load it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# safetensors dtype name -> (bytes per element, torch attribute name)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
SCALE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The ``scale_dtype`` of a scheme -> safetensors dtype."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a file header or a plan describes it. ``dtype`` is a key of `DTYPES`; linears are (out_features,
    in_features)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the data, without header or padding."""
        return self.numel * DTYPES[self.dtype][0]


class Role(str, Enum):
    """What a tensor is for; recipes match on it."""

    EMBED = "embed"
    NORM = "norm"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    LM_HEAD = "lm_head"
    MTP = "mtp"
    VISION = "vision"
    """Of a vision tower or its projector: carried as it is."""


class Projection(str, Enum):
    """Which linear of an attention or a gated MLP a tensor is, whatever its family calls it."""

    Q = "q"
    K = "k"
    V = "v"
    Q_A = "q_a"
    Q_B = "q_b"
    INDEX_Q = "index_q"
    """wq_b of the indexer of sparse attention."""
    KV_A = "kv_a"
    KV_B = "kv_b"
    OUT = "o"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    MTP_INPUT = "mtp_input"
    """eh_proj of DeepSeek's MTP layer: joins embedding and hidden state."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a checkpoint of this family must hold. ``layer`` is None outside the decoder layers; ``expert``
    is the routed expert's number. ``linear`` marks the 2-D weights that a recipe may quantise. ``float32`` marks what
    the official release stores in F32. ``table`` marks matrices that no calibration input reaches (vocabulary, MTP
    projections): only formats that store them in blocks quantise them.

    ``projection``: which linear it is, None for other tensors. ``fused``: last part of the name of the module that vLLM
    makes of this linear and its siblings of the same parent, which therefore need one scheme; None if it stays alone.
    ``replicated``: under tensor parallelism every rank of vLLM holds all of this linear. ``mtp_role``: the role that a
    tensor of an MTP layer, whose ``role`` is `Role.MTP`, would have in a decoder layer; None for what only MTP layers
    have.

    ``by_expert``: row i (of a vector: element i) belongs to routed expert i of the layer.

    ``part_of``: official name of the linear that this is a part of, for formats that store the parts; its shape is then
    (heads, out, in)."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None
    projection: Projection | None = None
    linear: bool = False
    float32: bool = False
    table: bool = False
    part_of: str | None = None
    mtp_role: Role | None = None
    fused: str | None = None
    replicated: bool = False
    by_expert: bool = False

    @property
    def base_role(self) -> Role:
        """What the tensor is for, MTP layer or not."""
        return self.mtp_role or self.role

    @property
    def official(self) -> str:
        """Name of the tensor in the source that holds this one."""
        return self.part_of or self.name


def stacked_shape(shape: tuple[int, ...], expert: int | None, n_experts: int) -> tuple[int, ...]:
    """Shape of the stored tensor that holds a tensor of ``shape``: ``expert`` is its number where the experts of a
    layer are stored as one, (experts, out, in), None for a tensor of its own."""
    return shape if expert is None else (n_experts, *shape)


class TensorSource(Protocol):
    """A checkpoint whose tensors are known from headers alone. Bytes move only in `read`.

    A source shows *decoded* tensors: an FP8-block weight appears as one BF16 tensor (its scale is not listed).
    """

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in file order."""
        ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor (or rows ``[start, stop)`` of its first dimension) on the CPU, in the dtype that `infos`
        states."""
        ...

    def prefetch(self, names: list[str]) -> None:
        """Tell the operating system that these tensors are read soon. Returns at once and takes no memory of the
        process."""
        ...


class RowSource(TensorSource, Protocol):
    """A source that also reads single rows of a matrix: there bytes move in `read_rows`, too."""

    def read_rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Rows of the first dimension, in the order asked for."""
        ...
