"""What a layout says of a scheme that it cannot hold, and which output can."""

from __future__ import annotations

from quantkit.errors import SchemeError
from quantkit.schemes import Scheme

_HOLDERS = {
    "int": "format: compressed-tensors stores integers of 2 to 8 bits, in groups or by row.",
    "float8": "format: compressed-tensors keeps FP8 blocks; keep: bf16 decodes them.",
    "nvfp4": "format: compressed-tensors stores NVFP4.",
    "mxfp4": "format: compressed-tensors stores MXFP4; in GGUF it is the block type MXFP4.",
    "mxfp8": "format: compressed-tensors stores MXFP8.",
    "w4afp8": "format: compressed-tensors stores integers whose inputs are rounded to FP8.",
    "bnb4": "format: bitsandbytes stores NF4 and FP4 of dense linears.",
    "ggml": "Block types of ggml go into outputs of format: gguf; keep: f32 decodes them, keep: bf16 rounds.",
}
"""Kind of a scheme -> the output that can hold it."""


def refusal(name: str, layout: str, scheme: Scheme, why: str = "") -> SchemeError:
    """One line: the linear, its scheme, the layout, ``why`` it does not hold it, and the output that does."""
    reason = f": {why}" if why else ""
    return SchemeError(f"{name}: {layout} cannot store {scheme.label}{reason}.", hint=_HOLDERS[scheme.kind])
