"""How fast a machine works, as `quantkit plan` and `quantkit convert` keep it in the user's cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantkit.documents.values import DocumentPart

Seconds = Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=1, le=1e18, allow_inf_nan=False)]
"""Per second."""


class KernelSpeed(DocumentPart):
    """Seconds that a method takes to choose codes in a scheme, for a matrix of (rows, n) weights: ``call`` * n + rows *
    n * (``weight`` + ``column`` * n); ``rescale`` for each weight while the factors of its input channels are searched;
    and ``decode`` for each weight that is decoded again."""

    call: Seconds
    weight: Seconds
    column: Seconds
    rescale: Seconds
    decode: Seconds


class DiskSpeed(DocumentPart):
    """Bytes a second, past the page cache."""

    read: Rate
    write: Rate


class SpeedDocument(DocumentPart):
    """What a benchmark of some seconds found. A file of the cache: whatever is wrong with it, it is measured anew."""

    version: Literal[1] = 1
    machine: Annotated[str, Field(max_length=400)]
    """Processor, kind of device, and versions: what the numbers depend on."""
    device: Annotated[str, Field(max_length=200)]
    """cpu, or the GPU's model."""
    threads: Annotated[int, Field(ge=1, le=65536)]
    flops: Rate
    """Of matrix products, in the dtype of the device."""
    memory: Rate
    """Bytes read and written by an operation on each number, whose result the C library puts where others were."""
    new_memory: Rate
    """The same for results of more than 32 MB: new pages, which the kernel zeroes first."""
    hashed: Rate
    """Bytes whose sha256 is taken."""
    call: Seconds
    """A small operation."""
    factor_square: Seconds
    factor_cube: Seconds
    """Of factoring a Hessian of n inputs: times n^2, times n^3."""
    kernels: Annotated[dict[str, KernelSpeed], Field(max_length=500)]
    disks: Annotated[dict[str, DiskSpeed], Field(max_length=100)]
    """By the numbers of the file systems' devices that are read and written."""
