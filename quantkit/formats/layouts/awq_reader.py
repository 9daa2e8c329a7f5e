"""Reads the layout "gemm" of AWQ checkpoints (AutoAWQ, gptqmodel, llm-awq's exports).

Of a linear with weight (N, K) in G groups of K / G inputs a file holds, under the module's name,

    qweight  int32 (K, N / 8)     eight 4-bit codes of neighbouring outputs to a word, interleaved: the nibbles from the
                                  lowest on are outputs 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   int32 (G, N / 8)     zero points, packed alike, as they are
    scales   float (G, N)

and weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = k // (K / G). The product is exact in float32;
runtimes round it to float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderReader, PackedLinear, Rows, from_groups, part, row_parts
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs whose codes are the nibbles of a word, from the lowest on."""
SHIFTS = tuple(4 * ORDER.index(output) for output in range(PER_WORD))
"""Where in its word each of eight outputs lies."""
_SCALES = ("F16", "BF16", "F32")
_LAYOUT_KEYS = ("version", "checkpoint_format", "format")


@dataclass(frozen=True, slots=True)
class _Awq:
    info: TensorInfo
    group_size: int
    scheme: None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """See `PackedLinear`."""
        module = self.info.name.removesuffix(".weight")
        return tuple(f"{module}.{name}" for name in ("qweight", "qzeros", "scales"))

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. The whole of the packed tensor is read: its rows run across the outputs."""
        import torch

        n_out, n_in = self.info.shape
        words, zero_words, scales = (raw.read(name) for name in self.parts)
        outputs = torch.arange(n_out)[rows]
        weight = torch.empty(len(outputs), n_in)
        for span in row_parts(rows):
            own = outputs[span]
            codes, zeros = _codes(words, own), _codes(zero_words, own)
            from_groups(codes, zeros.float(), scales[:, own].T.float(), weight[span])
        return weight


def _codes(words: Tensor, outputs: Tensor) -> Tensor:
    """words (n, N / 8) int32, outputs (m,) int64 -> codes (m, n) int32."""
    import torch

    used, place = torch.unique(outputs // PER_WORD, return_inverse=True)
    shifts = torch.tensor(SHIFTS, dtype=torch.int32).unsqueeze(-1)
    codes = words[:, used].T.contiguous().unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(2**BITS - 1)
    codes = codes.flatten(0, 1)  # all outputs of the words that are used
    wanted = place * PER_WORD + outputs % PER_WORD
    return codes if torch.equal(wanted, torch.arange(len(codes))) else codes[wanted]


def _find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    where = f"{raw.directory / 'config.json'}: quantization_config"
    for key in _LAYOUT_KEYS:
        layout = section.get(key, "gemm")
        if not isinstance(layout, str) or layout.lower() != "gemm":
            raise SourceError(f"{where}.{key} is {printable(repr(layout))}, 'gemm' was needed.")
    bits = section.get("bits", section.get("w_bit", BITS))
    if bits != BITS:
        raise SourceError(f"{where}.bits is {printable(repr(bits))}, {BITS} was needed.")
    modules = [name.removesuffix(".qweight") for name in raw.infos() if name.endswith(".qweight")]
    if not modules:
        raise SourceError(f"{where} says 'awq', but no tensor is named *.qweight.")
    return {f"{module}.weight": _linear(raw, module) for module in modules}


def _linear(raw: SafetensorsSource, module: str) -> _Awq:
    n_in, n_words = part(raw, f"{module}.qweight", ("I32",), (None, None)).shape
    n_out = n_words * PER_WORD
    n_groups = part(raw, f"{module}.scales", _SCALES, (None, n_out)).shape[0]
    part(raw, f"{module}.qzeros", ("I32",), (n_groups, n_words))
    if not n_in or not n_groups or n_in % n_groups:
        raise SourceError(
            f"{raw.path_of(f'{module}.scales')}: {printable(module)}: {n_groups:,} groups do not divide {n_in:,} "
            "inputs."
        )
    return _Awq(TensorInfo(f"{module}.weight", (n_out, n_in), "F32"), n_in // n_groups)


AWQ_READER = FolderReader("AWQ", _find)
