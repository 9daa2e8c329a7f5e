"""What tuning by gradient sees of a stored matrix: a level for each weight, and a few numbers that scale and shift
groups of them.

    weight = multiplier * levels[index] + addend

Indices move one by one; ``parameters`` (scales, a block's d and dmin) move to what can be stored. Sub-scales and zero
points stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.schemes.ggml.types import BlockParams, BlockType
    from quantkit.schemes.grid import Stored

Coefficients = tuple["Tensor", "Tensor | None"]
"""multiplier (B, out, groups) float32, and addend of the same shape or None. A row's groups have equal size."""


class Tunable(Protocol):
    """B stored matrices of one shape. ``levels`` (n,) float32, rising; ``index`` (B, out, in) uint8, places in it;
    ``parameters``: float32 as a runtime computes with them, () if none may move."""

    @property
    def levels(self) -> Tensor: ...
    @property
    def index(self) -> Tensor: ...
    @property
    def parameters(self) -> tuple[Tensor, ...]: ...

    def nearest(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The storable parameters next to these."""
        ...

    def coefficients(self, parameters: tuple[Tensor, ...]) -> Coefficients:
        """What multiplies and shifts the levels of each group. Autograd goes through it."""
        ...

    def stored(self, index: Tensor, parameters: tuple[Tensor, ...]) -> Stored:
        """index (B, out, in) uint8 and storable parameters -> arguments of the scheme's ``decode``."""
        ...


@dataclass(frozen=True, slots=True)
class TunableIntegers:
    """Integers with a scale for each group. scale, zero_point (B, out, groups) as they are stored, the latter None if
    the levels are centred; ``round_scale``: scales float32 -> the storable ones next to them."""

    bits: int
    index: Tensor
    scale: Tensor
    zero_point: Tensor | None
    round_scale: Callable[[Tensor], Tensor]

    @property
    def levels(self) -> Tensor:
        """Centred where the zero point is fixed, else the codes."""
        import torch

        zero = 2.0 ** (self.bits - 1) if self.zero_point is None else 0.0
        return torch.arange(2.0**self.bits, device=self.index.device) - zero

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The scales."""
        return (self.scale.float(),)

    def nearest(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In the dtype that is stored."""
        return (self.round_scale(parameters[0]),)

    def coefficients(self, parameters: tuple[Tensor, ...]) -> Coefficients:
        """The scales; minus the zero points times them."""
        (scale,) = parameters
        return scale, None if self.zero_point is None else -scale * self.zero_point.float()

    def stored(self, index: Tensor, parameters: tuple[Tensor, ...]) -> Stored:
        """As `IntScheme.decode` takes it."""
        stored = {"codes": index, "scale": parameters[0].to(self.scale.dtype)}
        return stored if self.zero_point is None else {**stored, "zero_point": self.zero_point}


@dataclass(frozen=True, slots=True)
class TunableBlocks:
    """A block type of ggml. ``codes`` (B, out, in) uint8, ``params``: of their blocks, of which d and dmin move but for
    MXFP4's powers of two."""

    kind: BlockType
    codes: Tensor
    params: BlockParams

    @property
    def levels(self) -> Tensor:
        """The type's different levels."""
        import torch

        return torch.tensor(sorted(set(self.kind.levels)), dtype=torch.float32, device=self.codes.device)

    @property
    def index(self) -> Tensor:
        """Places in ``levels``."""
        import torch

        rising = sorted(set(self.kind.levels))
        places = [rising.index(level) for level in self.kind.levels]
        return torch.tensor(places, dtype=torch.uint8, device=self.codes.device)[self.codes.int()]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """d, and dmin where the type has it."""
        if self.kind.name == "MXFP4":
            return ()
        return (self.params.d,) if self.params.dmin is None else (self.params.d, self.params.dmin)

    def nearest(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In float16."""
        import torch

        limit = torch.finfo(torch.float16).max
        return tuple(one.clamp(-limit, limit).half().float() for one in parameters)

    def coefficients(self, parameters: tuple[Tensor, ...]) -> Coefficients:
        """Scales and offsets of the groups."""
        params = self._with(parameters)
        return params.scale(), params.offset()

    def stored(self, index: Tensor, parameters: tuple[Tensor, ...]) -> Stored:
        """The blocks."""
        import torch

        from quantkit.schemes.ggml.layout import pack

        own = [self.kind.levels.index(level) for level in sorted(set(self.kind.levels))]
        codes = torch.tensor(own, dtype=torch.uint8, device=index.device)[index.int()]
        return {"blocks": pack(self.kind, codes, self._with(parameters))}

    def _with(self, parameters: tuple[Tensor, ...]) -> BlockParams:
        from quantkit.schemes.ggml.types import BlockParams

        d, dmin = (*parameters, *(self.params.d, self.params.dmin)[len(parameters) :])
        return BlockParams(self.params.d if d is None else d, dmin, self.params.sub_scale, self.params.sub_min)


@dataclass(frozen=True, slots=True)
class TunableFloats:
    """FP4 (e2m1) with a scale for each group, which stays: its steps are too wide to follow small changes.
    ``stored_codes`` (B, out, in) uint8; scale (B, out, groups) float32 as a runtime computes with it; ``others``: what
    is stored beside the codes."""

    stored_codes: Tensor
    scale: Tensor
    others: Stored
    parameters: tuple[Tensor, ...] = ()

    @property
    def levels(self) -> Tensor:
        """The fifteen different values."""
        from quantkit.schemes import fp4

        return fp4.table(self.stored_codes.device)

    @property
    def index(self) -> Tensor:
        """Places in ``levels``; minus zero is zero."""
        from quantkit.schemes import fp4

        return fp4.places(self.stored_codes)

    def nearest(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """There are none."""
        return parameters

    def coefficients(self, parameters: tuple[Tensor, ...]) -> Coefficients:
        """The scales."""
        return self.scale, None

    def stored(self, index: Tensor, parameters: tuple[Tensor, ...]) -> Stored:
        """As the scheme's ``decode`` takes it."""
        from quantkit.schemes import fp4

        return {**self.others, "codes": fp4.stored_codes(index)}
