"""FP4 (e2m1), the code that NVFP4 and MXFP4 share: sixteen values of four bits, sign and magnitude.

Grids count the fifteen different values from the lowest on; stored is the sign in bit 3 above e2m1's three bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.schemes.ggml.types import E2M1_LEVELS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEVELS = tuple(level / 2 for level in E2M1_LEVELS)
"""Value of each stored code; code 8 is minus zero. ggml counts in halves."""
LARGEST = 6.0
_RISING = tuple(sorted(set(LEVELS)))
_STORED = tuple(LEVELS.index(level) for level in _RISING)


def check_groups(name: str, shape: tuple[int, ...], label: str, group_size: int) -> None:
    """Raise `SchemeError` unless a tensor of this shape is a matrix whose rows are whole groups."""
    if len(shape) != 2:
        raise SchemeError(f"{name}: shape {list(shape)} is not a matrix.", hint="Add a rule that keeps this tensor.")
    if shape[1] % group_size:
        raise SchemeError(
            f"{name}: in_features {shape[1]} is not a multiple of {group_size}, the group of {label}.",
            hint="Use integers with a group_size that divides it, or a rule that keeps this tensor.",
        )


def table(device: torch.device) -> Tensor:
    """(15,) float32: the different values, rising."""
    import torch

    from quantkit.kernels.backend import constants

    return constants(_RISING, torch.float32, device)


def places(codes: Tensor) -> Tensor:
    """Stored codes, any integers -> places in `table`, uint8."""
    import torch

    places = [_RISING.index(level) for level in LEVELS]
    return torch.tensor(places, dtype=torch.uint8, device=codes.device)[codes.int()]


def stored_codes(codes: Tensor) -> Tensor:
    """Places in `table`, any integers -> what is stored, uint8."""
    import torch

    return torch.tensor(_STORED, dtype=torch.uint8, device=codes.device)[codes.int()]


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """values in units of their scale, levels as `table` has them -> places in it, int32; ties go to the lower one."""
    import torch

    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True)


def rounded(values: Tensor) -> Tensor:
    """The nearest levels of values in units of their scale, float32: as `nearest` but for ties, with no table to look
    into, which is faster."""
    import torch

    magnitude = values.abs().clamp_(max=LARGEST)
    step = torch.where(magnitude < 1.75, 0.5, torch.where(magnitude < 3.5, 1.0, 2.0))
    return magnitude.div_(step).round_().mul_(step).copysign_(values)


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Stored codes (..., out, in) uint8, scale (..., out, groups) float32 -> weight (..., out, in) float32."""
    import torch

    values = torch.tensor(LEVELS, device=codes.device)[codes.int()]
    grouped = values.view(*scale.shape, -1)
    return grouped.mul_(scale.unsqueeze(-1)).view(codes.shape)
