"""What a folder of safetensors holds: weights by role and storage, bits per weight, and what is unusual about it.
Headers only. `inspect_path` also takes what `inspection_gguf` understands.

Sources (BF16, F16, F32, FP8 blocks) and compressed-tensors outputs are understood weight by weight; of other formats
the stored tensors are listed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.errors import ConfigError, SourceError
from quantkit.formats.folder import PackedLinear
from quantkit.formats.layouts import READERS
from quantkit.formats.layouts.compressed_tensors import resolver_of
from quantkit.formats.layouts.fp4_pack_quantized import INPUT_SCALE
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.formats.source import quant_method, quantization_section, read_config
from quantkit.formats.storage import LOCAL, Storage
from quantkit.inspect import other_releases
from quantkit.inspect.storage import UNKNOWN_ROLE, StorageSummary, counted
from quantkit.plan.source_tensors import (
    contradicts_tied,
    listed_specs,
    note_of_copies,
    shared_copies,
    sort_unlisted,
    unfounded_mtp,
)
from quantkit.runtimes import int4_g32, mlx, transformers
from quantkit.runtimes.vllm import contract
from quantkit.schemes import Float8Scheme, IntScheme, Mxfp4Scheme, Mxfp8Scheme, Nvfp4Scheme, W4AFp8Scheme, describe
from quantkit.tensors import SCALE_DTYPES, Role, TensorInfo, TensorSpec

_PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_scale_inv", "_g_idx", "_global_scale")
_FP4: Mapping[frozenset[str], Nvfp4Scheme | Mxfp4Scheme] = {
    frozenset({"_packed", "_scale", "_global_scale"}): Nvfp4Scheme(),
    frozenset({"_packed", "_scale"}): Mxfp4Scheme(),
}
"""By the tensors of a linear whose codes lie in bytes."""
_NAMED_OTHERWISE = ("gptq", "awq", "auto-round")
"""quant_method of layouts whose tensors are not named after the weight."""
_NOTES = (contract.notes, transformers.problems, transformers.notes, mlx.notes, int4_g32.notes)
"""What runtimes say of planned tensors in a layout, as plans have it."""
_SCALE_DTYPES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """All that headers tell. ``family``: the architecture's name, "" if unknown; ``quantization``: what config.json
    says, "" for nothing; ``unusual``: a line for each thing that may be a mistake; ``notes``: for each that a runtime
    takes otherwise than one may expect."""

    directory: Path
    family: str
    quantization: str
    shards: int
    stored_tensors: int
    holdings: tuple[StorageSummary, ...]
    unusual: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Weights in the folder."""
        return sum(holding.parameters for holding in self.holdings)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(holding.nbytes for holding in self.holdings)

    @property
    def bpw(self) -> float:
        """Stored bits per weight of the whole."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0

    def __repr__(self) -> str:
        named = f"{self.family or 'unknown architecture'}, {self.quantization or 'not quantised'}"
        size = f"{self.stored_tensors:,} tensors, {self.nbytes:,} bytes, {self.bpw:.3f} bpw"
        return f"<Inspection {self.directory}: {named}; {size}; {len(self.unusual)} unusual>"


@dataclass(slots=True)
class _Weight:
    """A weight under its official name and the tensors that store it, by suffix ("" for the plain one)."""

    name: str
    parts: dict[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def inspect_folder(directory: Path | str, storage: Storage = LOCAL) -> Inspection:
    """Headers of all shards, config.json if there is one. Raises `SourceError` for damaged files; what is merely odd
    is reported."""
    directory = Path(directory)
    unusual: list[str] = []
    config = _config(directory, unusual)
    with SafetensorsSource(directory, storage=storage) as source:
        infos = source.infos()
        linears = _linears(source, config, unusual)
        shards = len({source.stored(name).file for name in infos})
        if source.unlisted:
            unusual.append(counted("tensors in the shards that the index does not list", list(source.unlisted)))
        family, arch = _family(config, unusual)
        tied = None if arch is None else contradicts_tied(arch.variants(), infos, source.equal)
    specs = {} if arch is None else {spec.name: spec for spec in listed_specs(arch, infos)}
    weights = _weights(infos, linears)
    groups = _stated_groups(config)
    planned = {
        name: PlannedTensor(linears[name].info, None, _label(config), specs.get(name))
        if name in linears
        else _planned(weight, specs.get(name), groups)
        for name, weight in weights.items()
    }
    planned = _as_stated(directory, config, planned)
    unusual += _of_no_scheme([weight for name, weight in weights.items() if planned[name] is None])
    if arch is not None:
        unusual += _unlisted(arch, specs, weights, tied)
        _compare_with_family(arch, specs, weights, planned, unusual)
    _compare_with_config(config, planned, infos, unusual)
    method = quant_method(config) or ""
    notes: list[str] = []
    if method == contract.COMPRESSED_TENSORS and any(tensor and tensor.scheme for tensor in planned.values()):
        known = [tensor for tensor in planned.values() if tensor is not None]
        unusual += contract.problems(known, method)
        notes += [line for of_runtime in _NOTES for line in of_runtime(known, method)]
    holdings = _storage(weights, planned, specs)
    return Inspection(directory, family, method, shards, len(infos), holdings, tuple(unusual), tuple(notes))


def _as_stated(
    directory: Path, config: Mapping[str, object], planned: Mapping[str, PlannedTensor | None]
) -> dict[str, PlannedTensor | None]:
    """With W4A8-FP8 where config.json says that inputs are rounded to FP8: the tensors are those of int4."""
    section = cast("dict[str, object]", quantization_section(config) or {})
    try:
        resolver = resolver_of(str(directory / "config.json"), section)
    except SourceError:  # another layout, or a faulty section, which is said by whoever reads the weights
        return dict(planned)
    found = dict(planned)
    for name, tensor in planned.items():
        if tensor is not None and isinstance(tensor.scheme, IntScheme):
            said = resolver.scheme(tensor.module)
            found[name] = replace(tensor, scheme=said) if isinstance(said, W4AFp8Scheme) else tensor
    return found


def _config(directory: Path, unusual: list[str]) -> dict[str, object]:
    if (directory / "config.json").exists():
        return read_config(directory)
    unusual.append("no config.json: neither the architecture nor the quantisation is stated.")
    return {}


def _family(config: Mapping[str, object], unusual: list[str]) -> tuple[str, ModelArch | None]:
    """Name and family of the architecture; ("", None) if quantkit does not know it or its config is faulty."""
    if not config:
        return "", None
    try:
        arch = arch_of(config)
    except ConfigError as error:
        unusual.append(str(error))
        return "", None
    return ", ".join(cast("list[str]", config["architectures"])), arch


def _linears(source: SafetensorsSource, config: Mapping[str, object], unusual: list[str]) -> Mapping[str, PackedLinear]:
    """Packed linears of layouts whose tensors are not named after the weight."""
    method = quant_method(config)
    if method not in _NAMED_OTHERWISE:
        return {}
    try:
        return READERS[method].find(source, cast("dict[str, object]", quantization_section(config)))
    except SourceError as error:
        unusual.append(str(error))
        return {}


def _label(config: Mapping[str, object]) -> str:
    """What reports call the layout that config.json names."""
    return READERS[quant_method(config) or ""].label


def _weights(infos: Mapping[str, TensorInfo], linears: Mapping[str, PackedLinear]) -> dict[str, _Weight]:
    """Stored tensors gathered under the weight that they store."""
    owners = {part: name for name, linear in linears.items() for part in linear.parts}
    weights: dict[str, _Weight] = {}
    for name, info in infos.items():
        if name in owners:
            weights.setdefault(owners[name], _Weight(owners[name])).parts[name] = info
            continue
        suffix = next((part for part in _PARTS if name.endswith(f".weight{part}")), "")
        owner = name.removesuffix(suffix)
        module = name.removesuffix(f".{INPUT_SCALE}")
        if f"{module}.weight_packed" in infos:  # what inputs are divided by, of no interest here but for its bytes
            suffix, owner = INPUT_SCALE, f"{module}.weight"
        owner, suffix = other_releases.part_of(name, infos) or (owner, suffix)
        weights.setdefault(owner, _Weight(owner)).parts[suffix] = info
    return weights


def _stated_groups(config: Mapping[str, object]) -> set[tuple[object, object]]:
    """(bits, group_size) of each config group of compressed-tensors; empty for anything that is not formed like one."""
    section = cast("dict[str, dict[str, dict[str, dict[str, object]]]]", quantization_section(config) or {})
    try:
        weights = [group["weights"] for group in section["config_groups"].values()]
        return {(entry["num_bits"], entry["group_size"]) for entry in weights}
    except (KeyError, TypeError, AttributeError):
        return set()


def _of_no_scheme(weights: Sequence[_Weight]) -> Iterator[str]:
    """One line for all weights whose tensors tell no scheme."""
    if weights:
        parts = ", ".join(f"{info.name} {info.dtype}" for _, info in sorted(weights[0].parts.items()))
        more = f" and {len(weights) - 1:,} more" if len(weights) > 1 else ""
        yield f"{weights[0].name}{more}: stored as {parts}, which fits no known scheme."


def _planned(weight: _Weight, spec: TensorSpec | None, groups: set[tuple[object, object]]) -> PlannedTensor | None:
    """The weight as a plan would have it, None if its storage is not understood."""
    parts = weight.parts
    if set(parts) == {""}:
        return PlannedTensor(parts[""], None, parts[""].dtype, spec)
    if (
        set(parts) in ({"", "_scale_inv"}, {"", "_scale"})
        and parts[""].dtype == "F8_E4M3"
        and len(parts[""].shape) == 2
    ):
        by_group = "_scale" in parts and parts["_scale"].dtype == "U8"
        return PlannedTensor(parts[""], Mxfp8Scheme() if by_group else Float8Scheme(), None, spec)
    if (found := other_releases.understood(parts)) is not None:
        return PlannedTensor(TensorInfo(weight.name, found[0], "BF16"), found[1], None, spec)
    fp4 = _FP4.get(frozenset(parts) - {INPUT_SCALE})
    if fp4 is not None and parts["_packed"].dtype == "U8" and len(parts["_packed"].shape) == 2:
        n_out, n_words = parts["_packed"].shape
        return PlannedTensor(TensorInfo(weight.name, (n_out, 2 * n_words), "BF16"), fp4, None, spec)
    if {"_packed", "_scale", "_shape"} <= set(parts) <= {"_packed", "_scale", "_shape", "_zero_point"}:
        scheme, shape = _int_scheme(parts, spec, groups)
        if scheme is not None:
            return PlannedTensor(TensorInfo(weight.name, shape, "BF16"), scheme, None, spec)
    return None


def _int_scheme(
    parts: Mapping[str, TensorInfo], spec: TensorSpec | None, groups: set[tuple[object, object]]
) -> tuple[IntScheme | None, tuple[int, ...]]:
    """Scheme and shape of a pack-quantized linear, read off the shapes. Without a family, codes count as 4 bits.

    One scale a row is a group as long as the row where config.json has such ``groups``, else a channel.
    """
    packed, scale = parts["_packed"], parts["_scale"]
    if len(packed.shape) != 2 or len(scale.shape) != 2 or not packed.numel or not scale.numel:
        return None, ()
    words, n_groups = packed.shape[1], scale.shape[1]
    in_features = spec.shape[1] if spec is not None and len(spec.shape) == 2 else words * 8
    bits = words * 32 // in_features
    if math.ceil(in_features * bits / 32) != words or in_features % n_groups:
        return None, ()
    grouped = n_groups > 1 or (bits, in_features) in groups
    scheme = {
        "bits": bits,
        "group_size": in_features // n_groups if grouped else None,
        "symmetric": "_zero_point" not in parts,
        "scale_dtype": _SCALE_DTYPES.get(scale.dtype),
    }
    try:
        return IntScheme.model_validate(scheme), (packed.shape[0], in_features)
    except ValidationError:
        return None, ()


def _unlisted(
    arch: ModelArch,
    specs: Mapping[str, TensorSpec],
    weights: Mapping[str, _Weight],
    contradiction: tuple[str, str] | None,
) -> list[str]:
    """What a plan leaves out with a note, and what it refuses."""
    refused, lines = ("", []) if contradiction is None else (contradiction[0], [contradiction[1]])
    unknown = [name for name in weights if name not in specs and name != refused]
    found = sort_unlisted(arch.variants(), unknown, specs)
    unexpected = list(found.unexpected)
    return [
        *lines,
        *found.notes,
        *([counted("tensors that the architecture does not have", unexpected)] if unexpected else []),
    ]


def _compare_with_family(
    arch: ModelArch,
    specs: Mapping[str, TensorSpec],
    weights: Mapping[str, _Weight],
    planned: Mapping[str, PlannedTensor | None],
    unusual: list[str],
) -> None:
    unfounded = unfounded_mtp(arch, weights)
    shared = {} if unfounded else shared_copies(arch, weights)
    unusual += [unfounded] if unfounded else note_of_copies(shared)
    missing = [name for name in specs if name not in weights and name not in shared]
    mtp = [name for name, spec in specs.items() if spec.role is Role.MTP]
    if mtp and all(name not in weights for name in mtp):
        unusual.append(f"no MTP layer, although config.json has num_nextn_predict_layers ({len(mtp):,} tensors).")
        missing = [name for name in missing if specs[name].role is not Role.MTP]
    shapes = [
        name for name, tensor in planned.items() if tensor and name in specs and tensor.info.shape != specs[name].shape
    ]
    narrowed = [
        name
        for name, tensor in planned.items()
        if tensor and name in specs and specs[name].float32 and tensor.keep_dtype != "F32"
    ]
    for text, names in (
        ("tensors of the architecture that are missing", missing),
        ("tensors whose shape does not fit config.json", shapes),
        ("tensors that the official release stores in float32 and this one does not", narrowed),
    ):
        if names:
            unusual.append(counted(text, names))


def _compare_with_config(
    config: Mapping[str, object],
    planned: Mapping[str, PlannedTensor | None],
    infos: Mapping[str, TensorInfo],
    unusual: list[str],
) -> None:
    method = quant_method(config)
    quantized = any(tensor is None or tensor.scheme is not None for tensor in planned.values())
    if method is None and quantized:
        unusual.append("the weights are quantised, but config.json has no quantization_config.")
    if method in ("fp8", "compressed-tensors") and not quantized:
        unusual.append(f"config.json says {method}, but no weight is quantised: quantization_config is stale.")
    doubles = [name for name, info in infos.items() if info.dtype == "F64"]
    if doubles:
        unusual.append(counted("tensors in float64", doubles))


def _storage(
    weights: Mapping[str, _Weight], planned: Mapping[str, PlannedTensor | None], specs: Mapping[str, TensorSpec]
) -> tuple[StorageSummary, ...]:
    totals: dict[tuple[str, str], list[int]] = {}
    for name, weight in weights.items():
        tensor = planned[name]
        role = specs[name].role.value if name in specs else UNKNOWN_ROLE
        if tensor is None:
            what, parameters = "unknown", 0
        else:
            what = describe(tensor.scheme) if tensor.scheme else str(tensor.keep_dtype).lower()
            parameters = math.prod(tensor.info.shape)
        total = totals.setdefault((role, what), [0, 0, 0])
        for place, amount in enumerate((1, parameters, weight.nbytes)):
            total[place] += amount
    order = {role.value: place for place, role in enumerate(Role)}
    return tuple(
        StorageSummary(role, what, *total)
        for (role, what), total in sorted(totals.items(), key=lambda item: order.get(item[0][0], len(order)))
    )
