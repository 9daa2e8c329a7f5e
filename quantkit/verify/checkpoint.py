"""A folder of safetensors as its config.json describes it: every tensor of the family with the scheme that a runtime
will take it for."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.formats.folder import object_of
from quantkit.formats.fp8_source import SCALE_SUFFIX
from quantkit.formats.layouts import LAYOUTS, auto_round
from quantkit.formats.layouts.compressed_tensors_config import KEPT, Resolver, is_module
from quantkit.formats.layouts.fp4_pack_quantized import INPUT_SCALE
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.formats.safetensors.unreadable import unreadable_shards
from quantkit.formats.source import quant_method, quantization_section, read_config
from quantkit.plan.source_tensors import listed_specs
from quantkit.schemes import Float8Scheme
from quantkit.tensors import TensorInfo, TensorSpec
from quantkit.verify.stated import FP8, PLAIN, SchemeOf, Stored, stated


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``method``: quant_method of config.json, or `PLAIN`; ``layout``: the method that stores the same tensors (of
    auto-round GPTQ or AWQ, else the method itself); ``section``: quantization_config in the words of ``layout``;
    ``resolver``: what its lists of targets say, where the method has such; ``read``: see `Stated`; ``planned``: every
    tensor of the family, MTP layers included, as config.json says it is stored; ``unreadable``: see
    `unreadable_shards`, ``raw`` is without them."""

    directory: Path
    config: Mapping[str, object]
    method: str
    layout: str
    section: Mapping[str, object]
    resolver: Resolver | None
    read: Mapping[str, tuple[str, ...]]
    raw: SafetensorsSource
    arch: ModelArch
    planned: tuple[PlannedTensor, ...]
    unreadable: Mapping[str, tuple[str, tuple[str, ...]]]

    def needed(self, tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
        """Names, shapes and dtypes of what the file must hold of a tensor."""
        if tensor.scheme is None:
            return (tensor.kept_info,)
        if self.method == FP8:
            assert isinstance(tensor.scheme, Float8Scheme)
            scale = TensorInfo(tensor.name + SCALE_SUFFIX, tensor.scheme.scale_shape(tensor.info.shape), "F32")
            return TensorInfo(tensor.name, tensor.info.shape, "F8_E4M3"), scale
        return (*LAYOUTS[self.layout].stored(tensor), *self._of_inputs(tensor))

    def _of_inputs(self, tensor: PlannedTensor) -> tuple[TensorInfo, ...]:
        """What NVFP4 inputs are divided by: found in calibration, where config.json says that it is not dynamic."""
        number = KEPT if self.resolver is None else self.resolver.group(tensor.module)
        if self.resolver is None or number == KEPT or self.resolver.groups[number].inputs.get("dynamic") != "local":
            return ()
        return (TensorInfo(f"{tensor.module}.{INPUT_SCALE}", (1,), "F32"),)


@contextmanager
def open_checkpoint(directory: Path) -> Generator[Checkpoint]:
    """Open a folder by its headers; shards that have none are left to `Checkpoint.unreadable`. Raises `SourceError` for
    what else is damaged or stored in a way that is not known, `ConfigError` for another architecture."""
    config = read_config(directory)
    arch = arch_of(config)
    method = quant_method(config) or PLAIN
    unreadable = unreadable_shards(directory)
    with SafetensorsSource(directory, without=unreadable) as raw:
        where = str(directory / "config.json")
        section = object_of(where, "quantization_config", quantization_section(config) or {})
        layout, section = auto_round.equivalent(where, section) if method == auto_round.METHOD else (method, section)
        said = stated(Stored(directory, config, section, raw), layout)
        planned = tuple(_planned(spec, said.scheme_of, raw.infos()) for spec in listed_specs(arch, raw.infos()))
        resolver, read = said.resolver, said.read
        yield Checkpoint(directory, config, method, layout, section, resolver, read, raw, arch, planned, unreadable)


def _planned(spec: TensorSpec, scheme_of: SchemeOf, stored: Mapping[str, TensorInfo]) -> PlannedTensor:
    """A kept tensor in the float that it is stored in, of those that runtimes convert."""
    info = TensorInfo(spec.name, spec.shape, "BF16")
    scheme = scheme_of(spec) if spec.linear or is_module(PlannedTensor(info, None, "BF16", spec)) else None
    if scheme is not None:
        return PlannedTensor(info, scheme, None, spec)
    found = stored.get(spec.name)
    dtype = found.dtype if found is not None and found.dtype in ("BF16", "F16", "F32") else "BF16"
    return PlannedTensor(info, None, dtype, spec)
