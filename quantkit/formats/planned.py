"""One tensor of a checkpoint that is to be written: what the source shows, and how the output holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.schemes import Scheme
from quantkit.tensors import Role, TensorInfo, TensorSpec


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """``info``: the tensor as the source shows it (official name, decoded dtype). Exactly one of ``scheme`` and
    ``keep_dtype`` is set: the grid it is stored on, or the safetensors dtype ("BF16", "F32", ...) it is kept in.

    ``spec``: what the family says of it, None where the family is not known.
    """

    info: TensorInfo
    scheme: Scheme | None
    keep_dtype: str | None
    spec: TensorSpec | None = None

    def __post_init__(self) -> None:
        assert (self.scheme is None) != (self.keep_dtype is None), f"{self.info.name}: one of scheme and keep_dtype"

    @property
    def name(self) -> str:
        """Official tensor name."""
        return self.info.name

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor, as configs of runtimes spell it: without ``.weight``."""
        return self.info.name.removesuffix(".weight")

    @property
    def layer(self) -> int | None:
        """Number of the layer; None outside the layers."""
        return None if self.spec is None else self.spec.layer

    @property
    def expert(self) -> int | None:
        """Number of the routed expert, None for other tensors."""
        return None if self.spec is None else self.spec.expert

    @property
    def role(self) -> Role | None:
        """What it is for."""
        return None if self.spec is None else self.spec.role

    @property
    def kept_info(self) -> TensorInfo:
        """How a kept tensor is stored: same name and shape, in ``keep_dtype``."""
        assert self.keep_dtype is not None, f"{self.info.name} is not kept"
        return replace(self.info, dtype=self.keep_dtype)
