"""compressed-tensors' formats by the kind of the scheme that they store."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats.layouts.float_quantized import FLOAT_QUANTIZED
from quantkit.formats.layouts.fp4_pack_quantized import MXFP4_PACK_QUANTIZED, NVFP4_PACK_QUANTIZED
from quantkit.formats.layouts.pack_quantized import PACK_QUANTIZED
from quantkit.formats.layouts.packing import Packing

PACKINGS: Mapping[str, Packing] = {
    "int": PACK_QUANTIZED,
    "float8": FLOAT_QUANTIZED,
    "nvfp4": NVFP4_PACK_QUANTIZED,
    "mxfp4": MXFP4_PACK_QUANTIZED,
}
