"""The ``quantization_config`` of compressed-tensors: which module is stored how, said in few patterns that are checked name by name.

Rules of the readers that shape what is written here (vLLM's compressed_tensors/utils.py, compressed-tensors' utils/match.py,
transformers' integrations/compressed_tensors.py):

- ``re:`` patterns are matched from the start of the module name; a match by name wins over the class name "Linear".
- vLLM asks for its fused modules (gate_up_proj, ...) by their own name first, then by class, and by the names of the parts last. So a
  pattern that takes all the parts must take the fused name too, else "Linear" of another group would win.
- ``ignore`` wins over every target; for a fused module vLLM asks for the parts.
- transformers takes for *all* routed experts the first group with a ``re:`` target that contains "experts", else the first that names
  a class. So among several groups that of the experts comes first and is named by a pattern.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Float8Scheme, IntScheme

FUSED_PARTS: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
"""Modules that vLLM builds from several linears of a checkpoint (``packed_modules_mapping``). Each must have one scheme."""

LINEAR = "Linear"
ALWAYS_IGNORED = "lm_head"

AnyScheme = IntScheme | Float8Scheme


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """A scheme and the targets (module names, ``re:`` patterns, or the class ``Linear``) that have it."""

    scheme: AnyScheme
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Targets:
    """All that a reader needs to say for each module whether and how it is quantised."""

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...]


def quantization_config(planned: Sequence[PlannedTensor]) -> dict[str, object]:
    """The section for config.json, in the form that compressed-tensors 0.20, transformers 5 and vLLM read; {} if nothing is quantised."""
    targets = find_targets(planned)
    if not targets.groups:
        return {}
    formats = {group_format(group.scheme) for group in targets.groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": list(targets.ignore),
        "config_groups": {f"group_{number}": _group_section(group) for number, group in enumerate(targets.groups)},
    }


def group_format(scheme: AnyScheme) -> str:
    """compressed-tensors' name for the way in which a scheme's tensors are stored."""
    return "pack-quantized" if isinstance(scheme, IntScheme) else "float-quantized"


def _group_section(group: ConfigGroup) -> dict[str, object]:
    return {
        "targets": list(group.targets),
        "format": group_format(group.scheme),
        "weights": _weights_section(group.scheme),
        "input_activations": _FLOAT8_INPUTS if isinstance(group.scheme, Float8Scheme) else None,
        "output_activations": None,
    }


def _weights_section(scheme: AnyScheme) -> dict[str, object]:
    if isinstance(scheme, Float8Scheme):
        return {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "block",
            "block_structure": list(scheme.block_size),
            "group_size": None,
            "dynamic": False,
            "actorder": None,
        }
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        # vLLM 0.24 compares this number also for channels, where null raises TypeError.
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


# DeepSeek's own recipe ("activation_scheme": "dynamic"): inputs are rounded to FP8 per token and 128 channels while serving.
_FLOAT8_INPUTS: dict[str, object] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": True,
}


def find_targets(planned: Sequence[PlannedTensor]) -> Targets:
    """Compact patterns if they are exact for every planned matrix and fused module, else the plain list of names."""
    linears = {tensor.module: tensor.scheme for tensor in planned if is_module(tensor)}
    schemes = _ordered_schemes(planned)
    if not schemes:
        return Targets((), (ALWAYS_IGNORED,))
    compact = _compact(linears, schemes)
    if mistakes(compact, linears):
        return _by_name(linears, schemes)
    return compact


def is_module(tensor: PlannedTensor) -> bool:
    """Whether a runtime may see a linear in this tensor: a matrix named ``.weight`` that is no input embedding."""
    return len(tensor.info.shape) == 2 and tensor.info.name.endswith(".weight") and tensor.role != "embed"


class Resolver:
    """Answers, as the readers do, which scheme a module has."""

    def __init__(self, targets: Targets) -> None:
        self._ignore = _Patterns(targets.ignore)
        self._groups = [(group.scheme, _Patterns(group.targets)) for group in targets.groups]
        self._default = next((group.scheme for group in targets.groups if LINEAR in group.targets), None)

    def scheme(self, module: str) -> AnyScheme | None:
        """Scheme of a linear, None if it is not quantised. The first group that names the module wins, then the class."""
        if self._ignore.match(module):
            return None
        return self.named(module) or self._default

    def named(self, module: str) -> AnyScheme | None:
        """Scheme of the first group that takes the module by name or pattern."""
        return next((scheme for scheme, patterns in self._groups if patterns.match(module)), None)

    def groups_naming(self, module: str) -> int:
        """How many groups take the module by name; more than one leaves the choice to the reader."""
        return sum(patterns.match(module) for _, patterns in self._groups)


def mistakes(targets: Targets, linears: dict[str, AnyScheme | None]) -> list[str]:
    """Modules that a reader would take for something else than planned, fused modules of vLLM included."""
    resolver = Resolver(targets)
    wrong = [
        module
        for module, scheme in linears.items()
        if resolver.scheme(module) != scheme or (scheme is not None and resolver.groups_naming(module) > 1)
    ]
    # An ignored fused module is recognised by its parts, checked above; a quantised one must resolve under its own name.
    wrong += [name for name, scheme in _fused_modules(linears) if scheme is not None and resolver.scheme(name) != scheme]
    return wrong


def _fused_modules(linears: dict[str, AnyScheme | None]) -> Iterable[tuple[str, AnyScheme | None]]:
    """Fused modules all of whose parts are present with one scheme. Routed experts are no modules of their own in vLLM."""
    for fused, parts in FUSED_PARTS.items():
        for module in linears:
            parent, _, leaf = module.rpartition(".")
            if leaf != parts[0] or parent.rpartition(".")[2].isdigit():
                continue
            schemes = {linears.get(f"{parent}.{part}", "absent") for part in parts}
            if len(schemes) == 1:
                yield f"{parent}.{fused}", linears[module]


def _ordered_schemes(planned: Iterable[PlannedTensor]) -> list[AnyScheme]:
    """Distinct schemes: those of routed experts first (the commonest first), then by number of linears; ties in planned order."""
    linears, experts = Counter[AnyScheme](), Counter[AnyScheme]()
    for tensor in planned:
        if tensor.scheme is not None:
            linears[tensor.scheme] += 1
            experts[tensor.scheme] += _is_expert(tensor.module)
    return sorted(linears, key=lambda scheme: (-experts[scheme], -linears[scheme]))


def _is_expert(module: str) -> bool:
    return any(part == "experts" for part in module.split("."))


# --- patterns -----------------------------------------------------------------------------------------------------------------------

_Key = AnyScheme | None
_Place = tuple[str, int]
"""(module name with * for numbers, number of the layer)"""


def _compact(linears: dict[str, _Key], schemes: list[AnyScheme]) -> Targets:
    """Patterns by parent module and leaf names; layer numbers appear only where layers of one kind differ."""
    kept_layers = _kept_layers(linears)
    places: dict[_Place, set[_Key]] = {}
    named: dict[_Key, list[str]] = {}
    for module, key in linears.items():
        place = _place(module)
        if place is None:
            named.setdefault(key, []).append(module)
        elif (_list_of_layers(place), place[1]) not in kept_layers:
            places.setdefault(place, set()).add(key)
    mixed = {place for place, keys in places.items() if len(keys) > 1}
    for module, key in linears.items():
        if _place(module) in mixed:
            named.setdefault(key, []).append(module)
    uniform = {place: next(iter(keys)) for place, keys in places.items() if place not in mixed}

    ignore = _layer_patterns(kept_layers) + _patterns(None, uniform, mixed) + named.get(None, [])
    ignored = tuple(dict.fromkeys([ALWAYS_IGNORED, *ignore]))
    if len(schemes) == 1:
        return Targets((ConfigGroup(schemes[0], (LINEAR,)),), ignored)
    by_class = next((s for s in schemes if not any(_is_expert(m) for m, key in linears.items() if key == s)), None)
    groups = [
        ConfigGroup(
            scheme,
            (LINEAR,) if scheme == by_class else (*_patterns(scheme, uniform, mixed), *named.get(scheme, [])),
        )
        for scheme in schemes
    ]
    return Targets(tuple(groups), ignored)


def _kept_layers(linears: dict[str, _Key]) -> set[tuple[str, int]]:
    """(list of layers, number) of layers without any quantised matrix: an MTP layer that is kept."""
    quantised: dict[tuple[str, int], bool] = {}
    for module, key in linears.items():
        place = _place(module)
        if place is not None:
            layer = _list_of_layers(place), place[1]
            quantised[layer] = quantised.get(layer, False) or key is not None
    return {layer for layer, some in quantised.items() if not some}


def _layer_patterns(layers: set[tuple[str, int]]) -> list[str]:
    """One pattern for whole layers of each list."""
    by_list: dict[str, list[str]] = {}
    for name, number in sorted(layers):
        by_list.setdefault(name.rpartition(".")[2], []).append(str(number))
    return [f"re:.*\\.{re.escape(name)}\\.{_alternatives(numbers)}\\..*" for name, numbers in by_list.items()]


def _list_of_layers(place: _Place) -> str:
    """model.layers.*.mlp.gate -> model.layers"""
    return place[0].partition(".*")[0]


def _place(module: str) -> _Place | None:
    """model.layers.7.mlp.experts.12.up_proj -> ("model.layers.*.mlp.experts.*.up_proj", 7); None for a module outside the layers."""
    parts = module.split(".")
    numbers = [part for part in parts if part.isdigit()]
    if not numbers or len(parts) < 3:
        return None
    return ".".join("*" if part.isdigit() else part for part in parts), int(numbers[0])


def _patterns(key: _Key, uniform: dict[_Place, _Key], mixed: set[_Place]) -> list[str]:
    """One pattern for the leaves of one parent that have ``key`` in the same layers."""
    layers_of: dict[str, set[int]] = {}
    for (template, layer), found in uniform.items():
        if found == key:
            layers_of.setdefault(template, set()).add(layer)
    all_layers: dict[str, set[int]] = {}
    for template, layer in [*uniform, *mixed]:
        all_layers.setdefault(template, set()).add(layer)
    leaves: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for template, layers in layers_of.items():
        parent, _, leaf = template.rpartition(".")
        where = () if layers == all_layers[template] else tuple(sorted(layers))
        leaves.setdefault((parent, where), []).append(leaf)
    return [_pattern(parent, layers, names, ignored=key is None) for (parent, layers), names in leaves.items()]


def _pattern(parent: str, layers: tuple[int, ...], leaves: list[str], *, ignored: bool) -> str:
    """``parent`` with * for numbers; ``layers`` () for all."""
    head, _, inner = parent.partition(".*")  # "model.layers", ".mlp.experts.*" or "" for a leaf of the layer itself
    start = ".*"
    if layers:
        start += f"\\.{re.escape(head.rpartition('.')[2])}\\.{_alternatives([str(layer) for layer in layers])}"
    elif not inner:
        start += f"\\.{re.escape(head.rpartition('.')[2])}\\.\\d+"
    is_experts = inner.endswith(".*")
    names = list(leaves)
    if not is_experts and not ignored:
        names += [fused for fused, parts in FUSED_PARTS.items() if set(parts) <= set(leaves)]
    leaf = _alternatives([re.escape(name) for name in names])
    if is_experts and ignored:
        # vLLM may ask for the block of experts under its own name.
        return f"re:{start}{_escaped(inner.removesuffix('.*'))}(\\.\\d+\\.{leaf})?$"
    return f"re:{start}{_escaped(inner)}\\.{leaf}$"


def _escaped(template: str) -> str:
    return r"\d+".join(re.escape(part) for part in template.split("*"))


def _alternatives(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"


def _by_name(linears: dict[str, _Key], schemes: list[AnyScheme]) -> Targets:
    """Every module by its name, fused ones included. Long, but right for any plan."""
    fused = list(_fused_modules(linears))
    groups = [
        ConfigGroup(
            scheme, (*(m for m, key in linears.items() if key == scheme), *(m for m, key in fused if key == scheme))
        )
        for scheme in schemes
    ]
    ignored = dict.fromkeys([ALWAYS_IGNORED, *(module for module, key in linears.items() if key is None)])
    return Targets(tuple(groups), tuple(ignored))


class _Patterns:
    """Names and ``re:`` patterns of a target list; class names match nothing."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._names = {target for target in targets if not target.startswith("re:")}
        self._regexes = [re.compile(target.removeprefix("re:")) for target in targets if target.startswith("re:")]

    def match(self, module: str) -> bool:
        return module in self._names or any(regex.match(module) for regex in self._regexes)
