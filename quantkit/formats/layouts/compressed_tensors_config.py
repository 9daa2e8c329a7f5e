"""The ``quantization_config`` of compressed-tensors: which module is stored how, said in few patterns that are checked
name by name.

Rules of the readers that shape what is written here (vLLM's compressed_tensors/utils.py, compressed-tensors'
utils/match.py, transformers' integrations/compressed_tensors.py):

- ``re:`` patterns are matched from the start of the module name; a match by name wins over the class name "Linear".
- vLLM asks for its fused modules (gate_up_proj, ...) by their own name first, then by class, and by the names of the
  parts last. So a pattern that takes all the parts must take the fused name too, else "Linear" of another group wins.
- ``ignore`` wins over every target; for a fused module vLLM asks for the parts.
- transformers takes for *all* routed experts the first group with a ``re:`` target that contains "experts", else the
  first that names a class. So among several groups that of the experts comes first and is named by a pattern.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantkit.formats.layouts.packings import PACKINGS
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Scheme
from quantkit.tensors import Role

LINEAR = "Linear"
ALWAYS_IGNORED = "lm_head"
"""What readers call the head, which they build also where a checkpoint has none of its own (tied embeddings)."""


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """A scheme and the targets (module names, ``re:`` patterns, or the class ``Linear``) that have it. ``inputs``: what
    a file says beside the scheme of how inputs are rounded while serving."""

    scheme: Scheme
    targets: tuple[str, ...]
    inputs: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class Targets:
    """All that a reader needs to say for each module whether and how it is quantised."""

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...]


def quantization_config(planned: Sequence[PlannedTensor]) -> dict[str, object]:
    """The section for config.json, in the form that compressed-tensors 0.20, transformers 5 and vLLM read; {} if
    nothing is quantised."""
    targets = find_targets(planned)
    if not targets.groups:
        return {}
    formats = {PACKINGS[group.scheme.kind].format for group in targets.groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": list(targets.ignore),
        "config_groups": {f"group_{number}": _group_section(group) for number, group in enumerate(targets.groups)},
    }


def _group_section(group: ConfigGroup) -> dict[str, object]:
    packing = PACKINGS[group.scheme.kind]
    return {
        "targets": list(group.targets),
        "format": packing.format,
        "weights": packing.weights(group.scheme),
        "input_activations": packing.inputs,
        "output_activations": None,
    }


def find_targets(planned: Sequence[PlannedTensor], *, whole_modules: bool = False) -> Targets:
    """Compact patterns if they are exact for every planned matrix and fused module, else the plain list of names.

    ``whole_modules``: for readers that ask for vLLM's modules by their own name alone: patterns also take ignored fused
    modules and blocks of quantised experts.
    """
    schemes, linears = _numbered_linears(planned)
    if not schemes:
        return Targets((), (ALWAYS_IGNORED,))
    targets = _compact(linears, schemes, whole_modules)
    if _mistakes(targets, linears, schemes):
        targets = _by_name(linears, schemes)
    return replace(targets, ignore=(*targets.ignore, *_carried(planned)))


def _carried(planned: Sequence[PlannedTensor]) -> list[str]:
    """A pattern for each part of the model that is carried: runtimes call its modules otherwise than checkpoints do."""
    parts = dict.fromkeys(tensor.name.partition(".")[0] for tensor in planned if tensor.role is Role.VISION)
    return [f"re:(.*\\.)?{re.escape(part)}\\..*" for part in parts]


def is_module(tensor: PlannedTensor) -> bool:
    """Whether a runtime may see a linear in this tensor: a matrix named ``.weight`` that is no input embedding. Those
    of a vision tower are ignored as a whole (`_carried`)."""
    matrix = len(tensor.info.shape) == 2 and tensor.info.name.endswith(".weight")
    return matrix and tensor.role not in (Role.EMBED, Role.VISION)


KEPT = -1


def numbered_schemes(schemes: Iterable[Scheme | None]) -> tuple[list[Scheme], list[int]]:
    """Distinct schemes in order of appearance, and for each given one its number, KEPT for None.

    Comparing two schemes costs a microsecond; a plan has tens of thousands of tensors that share a handful of scheme
    objects.
    """
    distinct: list[Scheme] = []
    numbers: dict[int, int] = {id(None): KEPT}
    keys: list[int] = []
    for scheme in schemes:
        number = numbers.get(id(scheme))
        if number is None:
            assert scheme is not None
            if scheme not in distinct:
                distinct.append(scheme)
            number = numbers[id(scheme)] = distinct.index(scheme)
        keys.append(number)
    return distinct, keys


@dataclass(frozen=True, slots=True)
class _Linears:
    """The linears of a plan. ``keys``: module -> number of its scheme, or KEPT; ``experts``: modules of routed experts;
    ``fused``: modules that vLLM builds from several linears (``packed_modules_mapping``) -> these. Each must have one
    scheme."""

    keys: dict[str, int]
    experts: set[str]
    fused: dict[str, list[str]]


def _numbered_linears(planned: Sequence[PlannedTensor]) -> tuple[list[Scheme], _Linears]:
    """Distinct schemes, and the linears with the schemes' numbers."""
    schemes, keys = numbered_schemes(tensor.scheme for tensor in planned)
    linears = _Linears({}, set(), {})
    for tensor, key in zip(planned, keys, strict=True):
        if not is_module(tensor):
            continue
        module, spec = tensor.module, tensor.spec
        linears.keys[module] = key
        if tensor.expert is not None:
            linears.experts.add(module)
        if spec is not None and spec.fused is not None:
            linears.fused.setdefault(f"{module.rpartition('.')[0]}.{spec.fused}", []).append(module)
    return schemes, linears


class Resolver:
    """Answers, as the readers do, which scheme a module has."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self.groups = targets.groups
        self._ignore = _Patterns(targets.ignore)
        self._patterns = [_Patterns(group.targets) for group in targets.groups]
        self._default = next((n for n, group in enumerate(targets.groups) if LINEAR in group.targets), KEPT)

    def group(self, module: str) -> int:
        """Number of the group of a linear, KEPT if it is not quantised. The first group that names the module wins,
        then the class."""
        if self._ignore.match(module):
            return KEPT
        return next(iter(self.naming(module)), self._default)

    def scheme(self, module: str) -> Scheme | None:
        """Scheme of a linear, None if it is not quantised."""
        number = self.group(module)
        return None if number == KEPT else self.groups[number].scheme

    def naming(self, module: str) -> list[int]:
        """Groups that take the module by name or pattern; more than one leaves the choice to the reader."""
        return [number for number, patterns in enumerate(self._patterns) if patterns.match(module)]


def mistakes(targets: Targets, planned: Sequence[PlannedTensor]) -> list[str]:
    """Modules that a reader would take for something else than planned, fused modules of vLLM included."""
    schemes, linears = _numbered_linears(planned)
    return _mistakes(targets, linears, schemes)


def _mistakes(targets: Targets, linears: _Linears, schemes: list[Scheme]) -> list[str]:
    resolver = Resolver(targets)
    expected = {number: schemes.index(group.scheme) for number, group in enumerate(targets.groups)} | {KEPT: KEPT}
    wrong = [
        module
        for module, key in linears.keys.items()
        if expected[resolver.group(module)] != key or (key != KEPT and len(resolver.naming(module)) > 1)
    ]
    # An ignored fused module is recognised by its parts, checked above; a quantised one must resolve under its own
    # name.
    wrong += [name for name, key in _fused_modules(linears) if key != KEPT and expected[resolver.group(name)] != key]
    return wrong


def _fused_modules(linears: _Linears) -> list[tuple[str, int]]:
    """Fused modules all of whose parts have one scheme."""
    found: list[tuple[str, int]] = []
    for fused, parts in linears.fused.items():
        keys = {linears.keys[part] for part in parts}
        if len(keys) == 1:
            found.append((fused, keys.pop()))
    return found


# --- patterns ---------------------------------------------------------------------------------------------------------

_Place = tuple[str, int]
"""(module name with * for numbers, number of the layer)"""
_FusedParts = dict[str, dict[str, set[str]]]
"""Name of a parent with * for numbers -> last part of a fused module's name -> those of its parts."""


def _compact(linears: _Linears, schemes: list[Scheme], whole: bool) -> Targets:
    """Patterns by parent module and the last parts of names; layer numbers appear only where layers of one kind
    differ."""
    found = [(module, key, _place(module)) for module, key in linears.keys.items()]
    kept_layers = _kept_layers((key, place) for _, key, place in found if place)
    keys_of: dict[_Place, set[int]] = {}
    for _, key, place in found:
        if place and (_list_of_layers(place), place[1]) not in kept_layers:
            keys_of.setdefault(place, set()).add(key)
    mixed = {place for place, keys in keys_of.items() if len(keys) > 1}
    named: dict[int, list[str]] = {}
    for module, key, place in found:
        if place is None or place in mixed:
            named.setdefault(key, []).append(module)
    uniform = {place: next(iter(keys)) for place, keys in keys_of.items() if place not in mixed}
    fused = _fused_parts(linears)

    ignore = _layer_patterns(kept_layers) + _patterns(KEPT, uniform, mixed, fused, whole) + named.get(KEPT, [])
    ignored = tuple(dict.fromkeys([ALWAYS_IGNORED, *ignore]))
    if len(schemes) == 1:
        return Targets((ConfigGroup(schemes[0], (LINEAR,)),), ignored)
    order, with_experts = _group_order(linears)
    by_class = next((key for key in order if key not in with_experts), KEPT)
    groups = [
        ConfigGroup(
            schemes[key],
            (LINEAR,) if key == by_class else (*_patterns(key, uniform, mixed, fused, whole), *named.get(key, [])),
        )
        for key in order
    ]
    return Targets(tuple(groups), ignored)


def _group_order(linears: _Linears) -> tuple[list[int], set[int]]:
    """Schemes of routed experts first (the commonest first), then by number of linears; and which of them experts
    have."""
    counts, experts = Counter[int](), Counter[int]()
    for module, key in linears.keys.items():
        if key != KEPT:
            counts[key] += 1
            experts[key] += module in linears.experts
    order = sorted(counts, key=lambda key: (-experts[key], -counts[key], key))
    return order, {key for key, n_experts in experts.items() if n_experts}


def _kept_layers(found: Iterable[tuple[int, _Place]]) -> set[tuple[str, int]]:
    """(list of layers, number) of layers without any quantised matrix: an MTP layer that is kept."""
    quantised: dict[tuple[str, int], bool] = {}
    for key, place in found:
        layer = _list_of_layers(place), place[1]
        quantised[layer] = quantised.get(layer, False) or key != KEPT
    return {layer for layer, some in quantised.items() if not some}


def _layer_patterns(layers: set[tuple[str, int]]) -> list[str]:
    """One pattern for whole layers of each list."""
    by_list: dict[str, list[str]] = {}
    for name, number in sorted(layers):
        by_list.setdefault(name.rpartition(".")[2], []).append(str(number))
    return [f"re:.*\\.{re.escape(name)}\\.{_alternatives(numbers)}\\..*" for name, numbers in by_list.items()]


_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def _list_of_layers(place: _Place) -> str:
    """model.layers.*.mlp.gate -> model.layers"""
    return place[0].partition(".*")[0]


def _place(module: str) -> _Place | None:
    """model.layers.7.mlp.experts.12.up_proj -> ("model.layers.*.mlp.experts.*.up_proj", 7); None for a module outside
    the layers."""
    first = _NUMBER.search(module)
    return (_template(module), int(first[1])) if first else None


def _template(module: str) -> str:
    """A module's name with * for numbers."""
    return _NUMBER.sub(".*", module)


def _fused_parts(linears: _Linears) -> _FusedParts:
    found: _FusedParts = {}
    for fused, parts in linears.fused.items():
        template, _, last = _template(fused).rpartition(".")
        found.setdefault(template, {})[last] = {part.rpartition(".")[2] for part in parts}
    return found


def _patterns(key: int, uniform: dict[_Place, int], mixed: set[_Place], fused: _FusedParts, whole: bool) -> list[str]:
    """One pattern for the modules of one parent that have ``key`` in the same layers."""
    layers_of: dict[str, set[int]] = {}
    all_layers: dict[str, set[int]] = {}
    for (template, layer), found in uniform.items():
        all_layers.setdefault(template, set()).add(layer)
        if found == key:
            layers_of.setdefault(template, set()).add(layer)
    for template, layer in mixed:
        all_layers.setdefault(template, set()).add(layer)
    endings: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for template, layers in layers_of.items():
        parent, _, last = template.rpartition(".")
        where = () if layers == all_layers[template] else tuple(sorted(layers))
        endings.setdefault((parent, where), []).append(last)
    if key != KEPT or whole:
        for (parent, _), names in endings.items():
            names += [module for module, parts in fused.get(parent, {}).items() if parts <= set(names)]
    blocks = key == KEPT or whole
    return [_pattern(parent, layers, names, blocks=blocks) for (parent, layers), names in endings.items()]


def _pattern(parent: str, layers: tuple[int, ...], endings: list[str], *, blocks: bool) -> str:
    """``parent`` with * for numbers; ``endings``: the last parts of its modules' names; ``layers`` () for all.
    ``blocks``: take the block of experts under its own name, for which vLLM may ask, too."""
    head, _, inner = parent.partition(".*")  # "model.layers", ".mlp.experts.*" or "" for a module of the layer itself
    start = ".*"
    if layers:
        start += f"\\.{re.escape(head.rpartition('.')[2])}\\.{_alternatives([str(layer) for layer in layers])}"
    elif not inner:
        start += f"\\.{re.escape(head.rpartition('.')[2])}\\.\\d+"
    ending = _alternatives([re.escape(name) for name in endings])
    if inner.endswith(".*") and blocks:
        return f"re:{start}{_escaped(inner.removesuffix('.*'))}(\\.\\d+\\.{ending})?$"
    return f"re:{start}{_escaped(inner)}\\.{ending}$"


def _escaped(template: str) -> str:
    return r"\d+".join(re.escape(part) for part in template.split("*"))


def _alternatives(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"


def _by_name(linears: _Linears, schemes: list[Scheme]) -> Targets:
    """Every module by its name, fused ones included. Long, but right for any plan."""
    names: dict[int, list[str]] = {}
    for module, key in [*linears.keys.items(), *_fused_modules(linears)]:
        names.setdefault(key, []).append(module)
    groups = tuple(ConfigGroup(schemes[key], tuple(names[key])) for key in _group_order(linears)[0])
    return Targets(groups, tuple(dict.fromkeys([ALWAYS_IGNORED, *names.get(KEPT, [])])))


class _Patterns:
    """Names and ``re:`` patterns of a target list; class names match nothing."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._names = {target for target in targets if not target.startswith("re:")}
        self._regexes = [re.compile(target.removeprefix("re:")) for target in targets if target.startswith("re:")]

    def match(self, module: str) -> bool:
        return module in self._names or any(regex.match(module) for regex in self._regexes)
