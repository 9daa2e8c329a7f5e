"""compressed-tensors' formats by the kind of the scheme that they store."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats.layouts.float_quantized import FLOAT_QUANTIZED
from quantkit.formats.layouts.fp4_pack_quantized import MXFP4_PACK_QUANTIZED, NVFP4_PACK_QUANTIZED
from quantkit.formats.layouts.mxfp8_quantized import MXFP8_QUANTIZED
from quantkit.formats.layouts.pack_quantized import PACK_QUANTIZED
from quantkit.formats.layouts.packing import Packing
from quantkit.formats.layouts.w4afp8 import W4AFP8

PACKINGS: Mapping[str, Packing] = {
    "w4afp8": W4AFP8,
    "int": PACK_QUANTIZED,
    "float8": FLOAT_QUANTIZED,
    "nvfp4": NVFP4_PACK_QUANTIZED,
    "mxfp4": MXFP4_PACK_QUANTIZED,
    "mxfp8": MXFP8_QUANTIZED,
}
"""The first that knows a config group reads it: integers whose inputs are rounded to FP8 come before all others."""
