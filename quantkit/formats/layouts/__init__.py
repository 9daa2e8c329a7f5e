"""How folders of safetensors store quantised linears, one file for each way."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats.folder import FolderLayout, FolderReader
from quantkit.formats.layouts import auto_round
from quantkit.formats.layouts.awq import AWQ
from quantkit.formats.layouts.bitsandbytes import BITSANDBYTES
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.layouts.gptq import GPTQ, GPTQ_V2

LAYOUTS: Mapping[str, FolderLayout] = {
    "compressed-tensors": COMPRESSED_TENSORS,
    "gptq": GPTQ,
    "gptq_v2": GPTQ_V2,
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
}
"""What can be written, by the ``format`` of a recipe's output."""

READERS: Mapping[str, FolderReader] = {
    "compressed-tensors": COMPRESSED_TENSORS.reader,
    "gptq": GPTQ.reader,
    "awq": AWQ.reader,
    "bitsandbytes": BITSANDBYTES.reader,
    auto_round.METHOD: auto_round.AUTO_ROUND_READER,
}
"""What can be read, by the ``quant_method`` of config.json."""

__all__ = ["LAYOUTS", "READERS"]
