"""What config.json says of each module's weight, by its quant_method: the scheme that runtimes will take it for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from quantkit.errors import SourceError
from quantkit.formats.folder import object_of
from quantkit.formats.fp8_source import SCALE_SUFFIX
from quantkit.formats.layouts import READERS, compressed_tensors
from quantkit.formats.layouts.compressed_tensors_config import Resolver
from quantkit.formats.safetensors.header import printable
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.formats.source import float8_block_size
from quantkit.runtimes.vllm.contract import is_plain
from quantkit.schemes import Bnb4Scheme, Float8Scheme, IntScheme, Scheme
from quantkit.tensors import TensorInfo, TensorSpec

COMPRESSED_TENSORS, FP8, GPTQ, AWQ = "compressed-tensors", "fp8", "gptq", "awq"
BITSANDBYTES, PLAIN = "bitsandbytes", "unquantised"

SchemeOf = Callable[[TensorSpec], Scheme | None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A folder's config.json, its quantization_config ({} if it has none), and the tensors in its files."""

    directory: Path
    config: Mapping[str, object]
    section: Mapping[str, object]
    raw: SafetensorsSource

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is stored, by name."""
        return self.raw.infos()

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.directory / "config.json")

    def is_packed(self, spec: TensorSpec) -> bool:
        """Whether a linear has codes in the way of GPTQ and AWQ; one of which nothing is stored counts as packed."""
        packed = f"{spec.name.removesuffix('.weight')}.qweight" in self.infos
        return packed or (spec.linear and spec.name not in self.infos)


@dataclass(frozen=True, slots=True)
class Stated:
    """``scheme_of``: None for what is not quantised; ``resolver``: lists of targets, where the method has such;
    ``read``: linears that the layout's reader found, with their tensors, where no more is known than that."""

    scheme_of: SchemeOf
    resolver: Resolver | None = None
    read: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def stated(stored: Stored, method: str) -> Stated:
    """Raises `SourceError` for a method, or an entry of it, that is not known."""
    if method in _READ:
        return _READ[method](stored)
    if method not in READERS:
        raise SourceError(
            f"{stored.where}: quantization_config says {printable(repr(method))}, whose load contract is not known.",
            hint=f"Known are {', '.join(dict.fromkeys([*_READ, *READERS]))}.",
        )
    linears = READERS[method].find(stored.raw, stored.section)
    return Stated(lambda spec: None, read={name: linear.parts for name, linear in linears.items()})


def _plain(stored: Stored) -> Stated:
    return Stated(lambda spec: None)


def _fp8(stored: Stored) -> Stated:
    """DeepSeek's own layout: what is FP8 is told by the dtype."""
    block = float8_block_size(stored.directory, stored.config)
    assert block is not None
    scheme = Float8Scheme(block_size=block)

    def scheme_of(spec: TensorSpec) -> Scheme | None:
        found = stored.infos.get(spec.name)
        scaled = spec.name + SCALE_SUFFIX in stored.infos
        return scheme if scaled or (found is not None and found.dtype == "F8_E4M3") else None

    return Stated(scheme_of)


def _compressed_tensors(stored: Stored) -> Stated:
    resolver = compressed_tensors.resolver_of(stored.where, stored.section)

    def scheme_of(spec: TensorSpec) -> Scheme | None:
        module = spec.name.removesuffix(".weight")
        plain = spec.name in stored.infos and by_class_alone(resolver, spec)
        return None if plain else resolver.scheme(module)

    return Stated(scheme_of, resolver)


def by_class_alone(resolver: Resolver, spec: TensorSpec) -> bool:
    """Whether no name or pattern takes the module, and vLLM and transformers build it as none of the class Linear: a
    router that Kimi K2-Thinking's ignore does not list is not quantised."""
    return is_plain(spec) and not resolver.naming(spec.name.removesuffix(".weight"))


def _gptq(stored: Stored) -> Stated:
    """One scheme, and others by the patterns of "dynamic". A module without codes that no pattern names is not
    quantised: vLLM looks for codes in the headers."""
    base = _int_scheme(stored, stored.section)
    rules = tuple(_rules(stored, base))

    def scheme_of(spec: TensorSpec) -> Scheme | None:
        if not stored.is_packed(spec):
            return None
        module = spec.name.removesuffix(".weight")
        return next((scheme for pattern, scheme in rules if pattern.match(module)), base)

    return Stated(scheme_of)


def _rules(stored: Stored, base: IntScheme) -> Iterator[tuple[re.Pattern[str], IntScheme | None]]:
    """ "-:pattern": not quantised; "+:pattern": with other settings. The first that matches decides."""
    for key, changes in object_of(stored.where, "dynamic", stored.section.get("dynamic") or {}).items():
        try:
            pattern = re.compile(key.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise SourceError(f"{stored.where}: dynamic: {printable(repr(key))} is no pattern ({error}).") from None
        changed = object_of(stored.where, f"dynamic.{printable(key)}", changes)
        yield pattern, None if key.startswith("-:") else _int_scheme(stored, {**stored.section, **changed})


def _awq(stored: Stored) -> Stated:
    scheme = _int_scheme(stored, {**stored.section, "sym": stored.section.get("zero_point") is False})
    # Zero points are stored, whatever they are.
    scheme = scheme.model_copy(update={"symmetric": False})
    return Stated(lambda spec: scheme if stored.is_packed(spec) else None)


def _bitsandbytes(stored: Stored) -> Stated:
    """The tensors tell which linears there are and how long blocks are, the section the rest."""
    kind = "fp4" if stored.section.get("bnb_4bit_quant_type") == "fp4" else "nf4"
    double = stored.section.get("bnb_4bit_use_double_quant") is True

    def scheme_of(spec: TensorSpec) -> Scheme | None:
        scales = stored.infos.get(f"{spec.name}.absmax")
        if scales is None or not scales.numel:
            return None
        block = math.prod(spec.shape) // scales.numel
        entries = {"type": kind, "double_quant": double, "block_size": block}
        try:
            return Bnb4Scheme.model_validate(entries)
        except ValidationError:
            raise SourceError(
                f"{stored.directory}: {printable(scales.name)} has {scales.numel:,} scales.",
                hint="One for each block of 64, 128, 256 or 512 weights was needed.",
            ) from None

    return Stated(scheme_of)


def _int_scheme(stored: Stored, section: Mapping[str, object]) -> IntScheme:
    group_size = section.get("group_size", 128)
    entries = {
        "bits": section.get("bits", section.get("w_bit", 4)),
        "group_size": None if group_size == -1 else group_size,
        "symmetric": section.get("sym", True),
        "scale_dtype": "float16",
    }
    try:
        return IntScheme.model_validate(entries)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = printable(".".join(map(str, cast("tuple[object, ...]", first["loc"]))))
        raise SourceError(f"{stored.where}: quantization_config: {key}: {first['msg']}.") from None


_READ: Mapping[str, Callable[[Stored], Stated]] = {
    PLAIN: _plain,
    FP8: _fp8,
    COMPRESSED_TENSORS: _compressed_tensors,
    GPTQ: _gptq,
    AWQ: _awq,
    BITSANDBYTES: _bitsandbytes,
}
