"""Reads GPTQ checkpoints (AutoGPTQ, gptqmodel).

Of a linear with weight (N, K) in G groups a file holds, under the module's name,

    qweight  int32 (K * bits / 32, N)   codes, a dense little-endian stream down each column
    qzeros   int32 (G, N * bits / 32)   zero points, the same along rows; layout v1 stores them less one (modulo
                                        2**bits), v2 as they are
    scales   float (G, N)
    g_idx    int32 (K,)                 each input's group: k // group_size, or permuted by act-order; may be absent

and weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k]. Bits and groups follow from the shapes,
so modules that differ from the config (gptqmodel's "dynamic") are read as well. The product is exact in float32;
runtimes round it to float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import SourceError
from quantkit.formats.bitpack import WORD_BITS, n_words, unpack
from quantkit.formats.folder import FolderReader, PackedLinear, Rows, from_groups, part, row_parts
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
SCALES = ("F16", "BF16", "F32")
_STORED_LESS_ONE = {"gptq": 1, "gptq_v2": 0}
"""checkpoint_format -> what was subtracted from zero points before they were packed."""
_WORDS = ".qweight"


@dataclass(frozen=True, slots=True)
class _Gptq:
    """``has_groups``: g_idx is stored."""

    info: TensorInfo
    bits: int
    n_groups: int
    zero_offset: int
    has_groups: bool
    scheme: None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """See `PackedLinear`."""
        names = ("qweight", "qzeros", "scales", "g_idx") if self.has_groups else ("qweight", "qzeros", "scales")
        module = self.info.name.removesuffix(".weight")
        return tuple(f"{module}.{name}" for name in names)

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`. The whole of the packed tensor is read: its rows run across the outputs."""
        import torch

        n_out, n_in = self.info.shape
        words = raw.read(self.parts[0])[:, rows].T.contiguous()
        zeros = unpack(raw.read(self.parts[1]), self.bits, n_out)[:, rows].T
        zeros = (zeros + self.zero_offset).bitwise_and_(2**self.bits - 1).float()
        scales = raw.read(self.parts[2])[:, rows].T.float()
        group = self._groups(raw)
        weight = torch.empty(len(words), n_in)
        for span in row_parts(rows):
            codes = unpack(words[span], self.bits, n_in)
            if group is None:
                from_groups(codes, zeros[span], scales[span], weight[span])
            else:
                torch.sub(codes, zeros[span][:, group], out=weight[span]).mul_(scales[span][:, group])
        return weight

    def _groups(self, raw: SafetensorsSource) -> Tensor | None:
        """(K,) int64; None for groups of equal size one after the other."""
        import torch

        n_in = self.info.shape[1]
        if not self.has_groups:
            return None
        group = raw.read(self.parts[3]).long()
        if len(group) and not 0 <= int(group.min()) <= int(group.max()) < self.n_groups:
            raise SourceError(
                f"{raw.path_of(self.parts[3])}: {printable(self.parts[3])} names groups from {int(group.min())} to "
                f"{int(group.max())}, there are {self.n_groups}."
            )
        plain = n_in % self.n_groups == 0 and torch.equal(group, torch.arange(n_in) // (n_in // self.n_groups))
        return None if plain else group


def _find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    where = f"{raw.directory / 'config.json'}: quantization_config"
    layout = section.get("checkpoint_format", section.get("format", "gptq"))
    offset = _STORED_LESS_ONE.get(layout) if isinstance(layout, str) else None
    if offset is None or section.get("is_marlin_format"):
        found = "marlin" if section.get("is_marlin_format") else layout
        raise SourceError(f"{where}.checkpoint_format is {printable(repr(found))}, 'gptq' or 'gptq_v2' was needed.")
    bits = section.get("bits")
    if not isinstance(bits, int) or bits not in BITS:
        raise SourceError(f"{where}.bits is {printable(repr(bits))}, one of {', '.join(map(str, BITS))} was needed.")
    varied = bool(section.get("dynamic"))
    modules = [name.removesuffix(_WORDS) for name in raw.infos() if name.endswith(_WORDS)]
    if not modules:
        raise SourceError(f"{where} says 'gptq', but no tensor is named *{_WORDS}.")
    return {f"{module}.weight": _linear(raw, module, bits, varied, offset) for module in modules}


def _linear(raw: SafetensorsSource, module: str, bits: int, varied: bool, offset: int) -> _Gptq:
    n_words_in, n_out = part(raw, f"{module}.qweight", ("I32",), (None, None)).shape
    n_groups = part(raw, f"{module}.scales", SCALES, (None, n_out)).shape[0]
    where = f"{raw.path_of(f'{module}.qweight')}: {printable(module)}"
    has_groups = f"{module}.g_idx" in raw.infos()
    n_in = (
        part(raw, f"{module}.g_idx", ("I32", "I64"), (None,)).shape[0] if has_groups else n_words_in * WORD_BITS // bits
    )
    fitting = [b for b in BITS if n_words(n_in, b) == n_words_in]
    own = bits if bits in fitting else (fitting[0] if fitting and varied else None)
    if own is None or not n_in:
        raise SourceError(
            f"{where}: qweight has {n_words_in:,} rows of words, {n_words(n_in, bits):,} were needed for {n_in:,} "
            f"inputs of {bits} bits."
        )
    part(raw, f"{module}.qzeros", ("I32",), (n_groups, n_words(n_out, own)))
    if not n_groups or (not has_groups and n_in % n_groups):
        raise SourceError(f"{where}: {n_groups:,} groups do not divide {n_in:,} inputs.")
    info = TensorInfo(f"{module}.weight", (n_out, n_in), "F32")
    return _Gptq(info, own, n_groups, offset, has_groups)


GPTQ_READER = FolderReader("GPTQ", _find)
