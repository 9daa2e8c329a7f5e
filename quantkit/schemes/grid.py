"""What a method that chooses codes sees of a scheme: scales that are fixed, and the values that each weight may take.

    weight ~ scale * level + offset          level = code - zero, or table[code]

A `Grid` belongs to B matrices of one shape. Scales may still be moved, to values that can be stored, group by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Stored = Mapping[str, Tensor]
    """A quantised matrix (or a batch) as its scheme stores it: arguments of the scheme's ``decode``."""


class Grid(Protocol):
    """Codes run from 0 to ``top``. ``table``: (top + 1,) float32, rising, for levels that are no integers in a row."""

    @property
    def scale(self) -> Tensor:
        """(B, out, groups) float32, as a runtime computes with it; zero in groups that have no extent."""
        ...

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """The dtype of which every number but 0 can be a scale, so that a kernel may round scales itself, as
        `nearest_scale` does. None if only `nearest_scale` knows what can be stored."""
        ...

    @property
    def zero(self) -> Tensor | float:
        """Code of level 0: one number, or (B, out, groups) float32. Without meaning if there is a table."""
        ...

    @property
    def offset(self) -> Tensor | None:
        """(B, out, groups) float32, added to scale * level; None: nothing."""
        ...

    @property
    def top(self) -> int:
        """The highest code."""
        ...

    @property
    def table(self) -> Tensor | None:
        """Level of each code where levels are no integers in a row."""
        ...

    def nearest_scale(self, group: int, wanted: Tensor) -> Tensor:
        """The storable scale of one group nearest to ``wanted`` (B, out) float32."""
        ...

    def nearest_offset(self, group: int, wanted: Tensor) -> Tensor:
        """The storable offset of one group nearest to ``wanted`` (B, out) float32."""
        ...

    def stored(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Stored:
        """codes (B, out, in) uint8 on scales and offsets that the two methods above gave -> what is stored."""
        ...


class VectorGrid(Protocol):
    """Fixed scales for B matrices whose weights are coded in vectors: ``width`` neighbours in storage order at once."""

    @property
    def width(self) -> int:
        """Neighbours in a vector."""
        ...

    def encode(self, values: Tensor, start: int, importance: Tensor) -> Tensor:
        """Code columns [start, start + width) as near to ``values`` (B, out, width) as importance (B, width) weighs it
        -> the values that were coded, the same shape."""
        ...

    def stored(self) -> Stored:
        """What is stored, once all columns are coded."""
        ...
