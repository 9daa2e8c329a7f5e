"""GGUF as a `Target`: llama.cpp's names, kv_b_proj in its two parts, experts stacked, types by preset or rules, and
imatrix.gguf beside the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.arch.base import KeyValue, ModelArch
from quantkit.arch.parts import GgufEntry, in_parts, stored_tensors
from quantkit.errors import SchemeError
from quantkit.formats.gguf import sink
from quantkit.formats.gguf.imatrix import ImatrixEntry, imatrix_layout
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf
from quantkit.formats.gguf.values import Value, array, boolean, f32, string, u32
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.source import checkpoint_name
from quantkit.plan.named_schemes import named_schemes
from quantkit.plan.recipe import GgufOutput, Recipe, Rule
from quantkit.runtimes.llama_cpp import contract, presets
from quantkit.runtimes.llama_cpp.command import DRAFT_FLAGS, serve
from quantkit.runtimes.llama_cpp.preset_attention import AttentionSizes
from quantkit.schemes import ChosenScheme, GgmlScheme, Scheme, describe
from quantkit.schemes.ggml.types import BLOCK_TYPES
from quantkit.schemes.repacking import block_type
from quantkit.tensors import Role, TensorSpec

if TYPE_CHECKING:
    from quantkit.formats.gguf.source import GgufSource

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION: of the block layouts."""
_UNQUANTISED = ("F32", "F16", "BF16")
MAX_STEM = 128
"""Characters of a folder's name that file names begin with: file systems allow 255 in all."""


class GgufTarget:
    """A `Target`."""

    label: str = "gguf"
    keep_mtp: str = "mtp: keep"

    def __init__(self, output: GgufOutput, recipe: Recipe, arch: ModelArch, specs: Sequence[TensorSpec]) -> None:
        self._output = output
        self._recipe = recipe
        self._arch = arch
        self._model = arch.gguf()
        self.specs: tuple[TensorSpec, ...] = in_parts(arch)
        self._carried = sum(spec.role is Role.VISION for spec in specs)
        self._fallbacks: Counter[tuple[str, str, str]] = Counter()

    def omits(self, spec: TensorSpec) -> bool:
        """The MTP layer, unless it is asked for: globs such as ``*.down_proj.weight`` would keep a part of it."""
        return self._output.mtp == "drop" and spec.role is Role.MTP

    @property
    def companion_bytes(self) -> int:
        """Bytes of imatrix.gguf."""
        entries = self._importance_entries() if self._writes_imatrix else []
        return sum(tensor.nbytes for entry in entries for tensor in entry.tensors())

    @property
    def _writes_imatrix(self) -> bool:
        return self._recipe.calibration is not None and self._output.imatrix

    @property
    def wants_mtp_importance(self) -> bool:
        """Of a stored MTP layer, in imatrix.gguf."""
        return self._writes_imatrix and self._output.mtp == "keep" and any(s.role is Role.MTP for s in self.specs)

    def preset_rule(self, spec: TensorSpec) -> Rule | None:
        """What the preset says: a block type, float32 for what llama-quantize leaves alone, or nothing without one.
        What chooses experts or keys stays float32 too; llama-quantize quantises an indexer's small matrices."""
        if self._output.preset is None:
            return None
        if spec.base_role is Role.ROUTER and self._output.preset not in _UNQUANTISED:
            return _rule_of("F32")
        stored = self._stored[self._model.stored_name(spec.name)[0]]
        kind = presets.preset_type(
            self._output.preset,
            stored.name,
            stored.shape,
            layer=spec.layer,
            n_layers=self._n_layers,
            n_experts=self._n_experts,
            importance=self._recipe.calibration is not None or self._recipe.imatrix is not None,
            tied=self._arch.lm_head == self._arch.embed,
            downs=self._downs.get(stored.name, 0),
            attention=self._attention,
        )
        return _rule_of(kind or "F32")

    def fitting(self, spec: TensorSpec, scheme: ChosenScheme) -> ChosenScheme:
        """The type itself, or the one that llama-quantize takes where rows are no whole blocks of it."""
        if not isinstance(scheme, GgmlScheme):
            raise SchemeError(
                f"{spec.name}: GGUF cannot store {describe(scheme)}.", hint="Take a block type, such as scheme: Q4_K."
            )
        kind = presets.fitting_type(scheme.type, spec.shape[-1])
        if kind == scheme.type or kind not in BLOCK_TYPES:
            return scheme
        self._fallbacks[self._model.stored_name(spec.name)[0].split(".", 2)[-1], scheme.type, kind] += 1
        return _type(kind)

    def exact_rule(self, spec: TensorSpec, stored: Scheme) -> str | None:
        """The block type with the same numbers; there is none for parts, one of which is transposed."""
        kind = None if spec.part_of else block_type(stored)
        return None if kind is None else f"scheme: {kind}, method: {{kind: repack}}"

    def kept_dtype(self, spec: TensorSpec, dtype: str) -> str:
        """Vectors and routers are float32 in every GGUF file: llama.cpp computes with them so."""
        return dtype if presets.is_quantised(self._model.stored_name(spec.name)[0], spec.shape) else "F32"

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Blocks, or the tensor itself."""
        return sink.nbytes_of(tensor)

    def choices(self, names: Sequence[str]) -> tuple[ChosenScheme, ...]:
        """Block types."""
        return named_schemes({kind: _type(kind) for kind in BLOCK_TYPES}, names, [_type(k) for k in contract.CHOICES])

    def joined(self, spec: TensorSpec) -> str:
        """The file's tensor: a projection's experts of a layer are stacked, gate and up lie apart."""
        return self._model.stored_name(spec.name)[0]

    def unchosen(self, spec: TensorSpec) -> ChosenScheme | None:
        """Wide types, as presets give tables."""
        return _type(contract.TABLE_TYPE if spec.table else contract.UNSEEN_TYPE)

    def file_bytes(self, source: Path, tensors: Sequence[PlannedTensor]) -> int:
        """All splits."""
        from quantkit.formats.tiktoken_model import tokenizer_file

        known = tokenizer_file(source).exists()
        values = self._key_values(source, tensors) if known else {}
        stored = self._file_tensors(tensors)
        return layout_gguf(self.stem(source), values, stored, self._output.max_shard_bytes).nbytes

    def problems(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """See `contract.problems`."""
        return contract.problems(tensors, self._model, sum(spec.role is Role.MTP for spec in self.specs))

    def notes(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """Types that were replaced because rows are too short, and what llama.cpp computes otherwise."""
        replaced = [
            f"{name}: {kind} for {wanted} ({count} times): rows are no whole blocks. llama-quantize does so too."
            for (name, wanted, kind), count in self._fallbacks.items()
        ]
        poor = self._without_importance(tensors)
        left = f"{self._carried:,} tensors of the vision tower: left out, llama.cpp reads them from an mmproj file."
        return [*replaced, *poor, *([left] if self._carried else []), *contract.notes(tensors, self._model)]

    def _without_importance(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """A line if llama-quantize would ask for an imatrix."""
        rounded = self._output.preset or any(
            rule.scheme is not None and (rule.method is None or rule.method.kind != "repack")
            for rule in self._output.rules
        )
        if not rounded or self._recipe.calibration is not None or self._recipe.imatrix is not None:
            return []
        found = [kind for kind in presets.NEED_IMPORTANCE if kind in sink.kinds_by_weights(tensors)]
        line = f"{', '.join(found)} without calibration or imatrix: llama-quantize refuses. All inputs count alike."
        return [line] if found else []

    def check_source(self, source: Path) -> tuple[str, ...]:
        """Raise `SourceError` for a tokenizer that llama.cpp does not know, or side files that cannot be copied. A line
        if it cuts text otherwise."""
        from quantkit.formats.gguf.pre_tokenizers import DIFFERENCES
        from quantkit.formats.gguf.vocabulary import vocabulary
        from quantkit.formats.side_files import LICENCE_FILES, check_side_files

        check_side_files(source, (*LICENCE_FILES, "*.json"))
        pre = vocabulary(source, self._arch.vocab_size, pre=self._output.pre)["tokenizer.ggml.pre"].value
        return tuple(line for name, line in DIFFERENCES.items() if name == pre)

    def open_sink(self, directory: Path, source: Path, tensors: Sequence[PlannedTensor]) -> sink.GgufSink:
        """See `GgufSink.open`."""
        from quantkit.formats.preallocated import combined

        layout = layout_gguf(
            self.stem(source),
            self._key_values(source, tensors),
            self._file_tensors(tensors),
            self._output.max_shard_bytes,
        )
        importance: dict[str, ImatrixEntry] = {}
        calibration = self._recipe.calibration
        if calibration is not None and self._writes_imatrix:
            entries = self._importance_entries()
            chunks = -(-calibration.tokens // calibration.sequence_length)
            layout = combined(layout, imatrix_layout(entries, calibration.data, chunks, calibration.sequence_length))
            importance = {entry.name: entry for entry in entries}
        opened = sink.GgufSink.open(directory, layout, tensors, self._model.stored_name, importance)
        opened.write_constants(self._model.constants())
        return opened

    def write_side_files(
        self, directory: Path, source: Path, config: Mapping[str, object], tensors: Sequence[PlannedTensor], mtp: bool
    ) -> None:
        """The licence: all else is inside the file."""
        from quantkit.formats.side_files import LICENCE_FILES, copy_side_files

        copy_side_files(source, directory, LICENCE_FILES)

    def open_written(self, directory: Path) -> GgufSource:
        """See `GgufSource`."""
        from quantkit.formats.gguf.source import GgufSource

        names = {spec.name: self._model.stored_name(spec.name) for spec in self.specs}
        return GgufSource(directory, names, tuple(self._arch.parts().values()))

    def serve_commands(self, source: Path, tensors: Sequence[PlannedTensor], folder: str = ".") -> tuple[str, ...]:
        """llama.cpp's server on the first file."""
        stored = self._file_tensors(tensors)
        first = layout_gguf(self.stem(source), {}, stored, self._output.max_shard_bytes).files[0].file
        flags = (*self._model.server_flags(), *(DRAFT_FLAGS if self._mtp_stored(tensors) else ()))
        return (serve(first if folder == "." else f"{folder}/{first}", flags),)

    def stem(self, source: Path) -> str:
        """The file's name without its ending: the checkpoint's folder and the output."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint_name(source))[:MAX_STEM].strip("-.") or "model"
        return f"{name}-{self._output.name}"

    def _file_tensors(self, tensors: Sequence[PlannedTensor]) -> list[GgufTensor]:
        constants = self._model.constants().items()
        own = (GgufTensor(name, (len(values),), "F32") for name, values in constants)
        return [*sink.stacked_tensors(tensors, self._model.stored_name), *own]

    @cached_property
    def _stored(self) -> dict[str, GgufEntry]:
        """Tensors of the file by name, MTP layers included."""
        return stored_tensors(self.specs, self._model)

    @cached_property
    def _downs(self) -> dict[str, int]:
        return presets.downs_before(self._stored)

    @cached_property
    def _attention(self) -> AttentionSizes:
        sizes = self._arch.serving()
        return AttentionSizes.of(self._model.architecture, self._n_layers, sizes.heads, sizes.kv_heads)

    @cached_property
    def _n_experts(self) -> int:
        experts = [spec.expert for spec in self.specs if spec.expert is not None]
        return max(experts) + 1 if experts else 0

    @cached_property
    def _n_layers(self) -> int:
        """Layers that the file will have, which llama-quantize's mixes count in."""
        mtp = {spec.layer for spec in self.specs if spec.role is Role.MTP}
        return self._arch.n_layers + (len(mtp) if self._output.mtp == "keep" else 0)

    def _mtp_stored(self, tensors: Sequence[PlannedTensor]) -> bool:
        return any(tensor.role is Role.MTP for tensor in tensors)

    def _key_values(self, source: Path, tensors: Sequence[PlannedTensor]) -> dict[str, Value]:
        from quantkit.formats.gguf.vocabulary import vocabulary

        model = self._model.key_values(mtp=self._mtp_stored(tensors))
        return {
            **{key: _value(value) for key, value in model.items()},
            "general.name": string(checkpoint_name(source)),
            "general.file_type": u32(self._file_type(tensors)),
            "general.quantization_version": u32(QUANTIZATION_VERSION),
            **vocabulary(source, self._arch.vocab_size, pre=self._output.pre),
        }

    def _file_type(self, tensors: Sequence[PlannedTensor]) -> int:
        """llama_ftype: of the preset, or of the type that holds most weights. It is shown, nothing depends on it."""
        if self._output.preset is not None:
            return presets.FILE_TYPES[self._output.preset]
        weights = sink.kinds_by_weights(tensors)
        most = max(weights, key=lambda kind: weights[kind])
        return next((p.file_type for p in presets.PRESETS.values() if p.default == most), presets.FILE_TYPES["F32"])

    def _importance_entries(self) -> list[ImatrixEntry]:
        """One for each tensor that calibration inputs reach."""
        return [
            ImatrixEntry(stored.name, stored.n_matrices, stored.shape[-1], experts=stored.stacked)
            for stored in self._stored.values()
            if stored.first.linear and not self.omits(stored.first)
        ]


@lru_cache(maxsize=64)
def _type(kind: str) -> GgmlScheme:
    return GgmlScheme.model_validate({"type": kind})


@lru_cache(maxsize=64)
def _rule_of(kind: str) -> Rule:
    if kind in ("F32", "F16", "BF16"):
        return Rule.model_validate({"match": "*", "keep": kind.lower()})
    return Rule.model_validate({"match": "*", "scheme": kind})


def _value(value: KeyValue) -> Value:
    if isinstance(value, tuple):
        return array("bool", value)
    if isinstance(value, bool):
        return boolean(value)
    if isinstance(value, int):
        return u32(value)
    return f32(value) if isinstance(value, float) else string(value)
