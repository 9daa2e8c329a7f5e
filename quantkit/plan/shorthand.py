"""A recipe from a few words: ``--scheme w4a16`` or ``--preset Q4_K_M``, with text and method if need be.

What the words mean is fixed by the model: routed experts are told from other linears, MTP layers are left out, and only
roles that the model has get a rule. The result is an ordinary `Recipe`; `recipe_yaml` writes it down. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.errors import RecipeError
from quantkit.formats.source import read_config
from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_file import nearest
from quantkit.plan.recipe_prune import parse_prune
from quantkit.plan.target_words import SPLIT_SIZE, TargetWords
from quantkit.plan.text_notes import MANY_EXPERTS, TOKENS_OF_MANY_EXPERTS, routed_experts
from quantkit.runtimes.llama_cpp.presets import FILE_TYPES
from quantkit.tensors import Role, TensorSpec

MIXED = "builtin:mixed"
"""Calibration text that comes with quantkit."""
TOKENS = 131072
"""Calibration tokens if nothing is said, but for text of one's own and many experts."""
SEQUENCE_LENGTH, WINDOW = 2048, 512
METHODS = ("gptq", "awq", "rtn")
SCHEMES = ("w4a16", "w8a16", "w2a16", "w3a16", "w5a16", "w6a16", "w7a16")
"""Names that messages show: one for each bit width from 2 to 8."""
_FLOATS = {"nvfp4": "nvfp4", "nvfp4a16": "nvfp4", "mxfp4": "mxfp4", "mxfp4a16": "mxfp4", "mxfp8": "mxfp8"}
"""Floats without case and punctuation, and the kind of their scheme, which all linears get."""
_FP8_INPUTS = "w4afp8"
"""w4a16 with inputs of the experts in FP8."""

_SCHEME = re.compile(r"w([2-8])a16(-all)?(?:-g(\d{1,6})|(-channel))?(-all)?")
_PRESETS = {
    **{re.sub(r"[^a-z0-9]", "", preset.lower()): preset for preset in FILE_TYPES},
    **{"q3k": "Q3_K_M", "q4k": "Q4_K_M", "q5k": "Q5_K_M"},
}
"""Presets without case and punctuation, and llama-quantize's short names of three of them."""
_LINEARS = (Role.ATTENTION, Role.MLP, Role.SHARED_EXPERT, Role.EXPERT)
_OTHERS = (Role.NORM, Role.ROUTER, Role.EMBED, Role.LM_HEAD)
_FOREIGN = {
    ("4bit", "int4", "w4"): ("a width alone", "--scheme w4a16"),
    ("8bit", "int8", "w8"): ("a width alone", "--scheme w8a16"),
    ("3bit", "int3", "w3"): ("a width alone", "--scheme w3a16"),
    ("2bit", "int2", "w2"): ("a width alone", "--scheme w2a16"),
    ("gptq", "autogptq", "gptqmodel", "marlin"): ("a method, the default one", "--scheme w4a16 --method gptq"),
    ("autoround",): ("another tool's method, which is not implemented", "--scheme w4a16"),
    ("awq", "autoawq"): ("a method", "--scheme w4a16 --method awq"),
    ("rtn",): ("a method", "--scheme w4a16 --method rtn"),
    ("nf4", "bnb", "bitsandbytes", "bnb4bit"): (
        "bitsandbytes NF4, which only a recipe's rules write",
        "--scheme w4a16",
    ),
    ("fp4",): ("the name of several formats, which only a recipe's rules write", "--scheme w4a16"),
    ("w4a4",): ("4-bit activations, which are not written", "--scheme w4a16"),
    ("fp8", "w8a8", "fp8dynamic", "fp8block"): ("8-bit activations, which are not written", "--scheme w8a16"),
    ("w4a8", "w4aint8"): ("8-bit integer activations, which are not written", "--scheme w4afp8"),
    ("w4a16asym",): ("an asymmetric grid, which only a recipe's rules give (symmetric: false)", "--scheme w4a16"),
    ("hqq", "exl2", "exl3", "eetq", "aqlm", "quip", "spqr"): ("a format that is not written", "--scheme w4a16"),
    ("gguf", "llamacpp"): ("a file format for many mixes of types", "--preset Q4_K_M"),
}
"""What other tools call their schemes, without case and punctuation: what that is, and the nearest thing here."""


_Smaller = Mapping[str, int | None]
_SMALLER_SIZES = (64, 32)
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Shorthand:
    """Options that stand for a recipe. One of ``scheme`` ("w4a16-g32") and ``preset`` ("Q4_K_M") says what is stored;
    ``group_size`` of a scheme: -1 is one scale a row; ``data``, ``tokens``: calibration text and how much of it;
    ``method``: "gptq", "awq", "rtn", None for gptq; ``target``: a size, in place of scheme and preset; ``prune``:
    experts that go, "25%" or "64"."""

    scheme: str | None = None
    preset: str | None = None
    group_size: int | None = None
    method: str | None = None
    data: tuple[str, ...] = ()
    tokens: int | None = None
    target: TargetWords = TargetWords()
    prune: str | None = None

    @property
    def given(self) -> bool:
        """Whether any option is."""
        return self != Shorthand()

    @property
    def what(self) -> str:
        """The options that say what is stored and how codes are chosen, as they are typed."""
        named = {
            "--scheme": self.scheme,
            "--preset": self.preset,
            "--group-size": self.group_size,
            "--method": self.method,
            "--prune": self.prune,
        }
        given = [f"{option} {value}" for option, value in named.items() if value is not None]
        return " ".join((*given, *self.target.words))

    @property
    def words(self) -> tuple[str, ...]:
        """All options as words of a command line."""
        text = [word for name in self.data for word in ("--data", name)]
        tokens = [] if self.tokens is None else ["--tokens", str(self.tokens)]
        return (*self.what.split(), *text, *tokens)

    @property
    def first(self) -> str:
        """An option that is given, for messages."""
        return self.words[0]


@dataclass(frozen=True, slots=True)
class _Widths:
    """Bits of the routed experts and of the other linears; ``group_size`` None is one scale a row; ``fp8_inputs``:
    those of the experts are rounded to FP8."""

    experts: int
    others: int
    group_size: int | None
    fp8_inputs: bool = False

    @property
    def name(self) -> str:
        """ "w4a16", "w3a16-all-g32", "w4a16-channel", "w4afp8"."""
        if self.fp8_inputs:
            return _FP8_INPUTS
        group = {None: "-channel", 128: ""}.get(self.group_size, f"-g{self.group_size}")
        return f"w{self.experts}a16{'-all' if self.experts == self.others != 8 else ''}{group}"


@dataclass(frozen=True, slots=True)
class _Float:
    """A float of 4 or 8 bits for all linears; ``name``: of its scheme and of the output."""

    name: str


def shorthand_recipe(source: Path, options: Shorthand, packed: frozenset[Role] = frozenset()) -> Recipe:
    """The recipe that the options stand for on this model. Reads config.json only. ``packed``: roles of tables that
    the source holds in blocks (see `packed_tables`), which a scheme's output keeps in bfloat16.

    Raises `RecipeError`, in one line, for options that are unknown or contradict each other, `SourceError` and
    `ConfigError` for a folder without a config.json that is known.
    """
    stored = None if options.target.words else _stored(options)
    output = _target(options) if stored is None else {}
    arch = arch_of(read_config(source))
    if isinstance(stored, _Widths | _Float):
        rules = _rules(stored, tuple(arch.tensors()), packed)
        output |= {"name": stored.name, "format": "compressed-tensors", "rules": rules}
    elif stored is not None:
        output |= {"name": stored, "format": "gguf", "preset": stored, "split_max_size": SPLIT_SIZE}
    if options.method is not None:
        output["method"] = {"kind": options.method}
    window = min(WINDOW, arch.serving().max_positions)
    values: dict[str, object] = {
        "version": 1,
        "description": f"What {options.what} stands for",
        "outputs": [output],
        "validation": {"text": ["builtin:eval"], "context": window, "max_windows_per_file": 16},
    }
    if options.method != "rtn" or options.data or options.tokens:
        values["calibration"] = _calibration(options, arch)
    if options.prune is not None:
        values["prune"] = {"experts": parse_prune(options.prune)}
    if options.target.sensitivity is not None:
        values["sensitivity"] = options.target.sensitivity
    return Recipe.from_dict(values)


def recipe_yaml(recipe: Recipe) -> str:
    """YAML that loads as an equal recipe. Relative files in it count from the file's folder."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    order = [key for key in Recipe.model_fields if key in values]
    ordered = {key: values[key] for key in order}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


# --------------------------------------------------------------------------------------------------------------- parts


def _rules(
    stored: _Widths | _Float, specs: Sequence[TensorSpec], packed: frozenset[Role]
) -> list[Mapping[str, object]]:
    """MTP is dropped, what is no linear kept, and each scheme has one rule; where groups do not divide the inputs of
    some linears, these have a rule before it."""
    roles = {spec.role for spec in specs}
    rules: list[Mapping[str, object]] = [{"match": "role:mtp", "drop": True}] if Role.MTP in roles else []
    rules.append({"match": _match(_OTHERS, roles - packed), "keep": "source"})
    if packed:
        rules.append({"match": _match(_OTHERS, roles & packed), "keep": "bf16"})
    if isinstance(stored, _Float):
        linears = tuple(reversed(_LINEARS))
        return [*rules, {"match": _match(linears, roles), "scheme": {"kind": stored.name}}]
    return [*rules, *_rules_by_bits(stored, roles, _smaller_groups(stored.group_size, specs))]


def _rules_by_bits(widths: _Widths, roles: set[Role], smaller: Mapping[Role, _Smaller]) -> list[Mapping[str, object]]:
    expert_bits = widths.experts if Role.EXPERT in roles else None
    other_bits = widths.others if expert_bits is not None else widths.experts
    rules: list[Mapping[str, object]] = []
    by_bits: dict[int, list[Role]] = {}
    for role in reversed(_LINEARS):
        bits = expert_bits if role is Role.EXPERT else other_bits
        if role in roles and bits is not None:
            by_bits.setdefault(bits, []).append(role)
    for bits, quantised in by_bits.items():
        scheme = {"kind": "int", "bits": bits, "group_size": widths.group_size}
        if widths.fp8_inputs and bits == widths.experts:
            scheme = {"kind": "w4afp8"}
        else:
            for role in quantised:
                for pattern, size in smaller.get(role, {}).items():
                    rules.append({"match": pattern, **_smaller_rule(scheme, size)})
        rules.append({"match": _match(tuple(quantised), roles), "scheme": scheme})
    return rules


def _smaller_rule(scheme: Mapping[str, object], size: int | None) -> Mapping[str, object]:
    return {"keep": "source"} if size is None else {"scheme": {**scheme, "group_size": size}}


def _smaller_groups(size: int | None, specs: Sequence[TensorSpec]) -> Mapping[Role, _Smaller]:
    """Of the linears whose inputs are no whole groups of ``size``: by role, a glob and the largest usual size that
    divides them, None if none does. The experts of a model have one size, as runtimes take them."""
    found: dict[Role, dict[str, int | None]] = {}
    for spec in specs:
        if size is None or not spec.linear or spec.role not in _LINEARS or spec.shape[-1] % size == 0:
            continue
        smaller = [usual for usual in _SMALLER_SIZES if usual < size and spec.shape[-1] % usual == 0]
        fitting = max(smaller, default=None)
        whole = spec.role is Role.EXPERT
        pattern = "role:expert" if whole else _NUMBER.sub(".*.", spec.name)
        sizes = found.setdefault(spec.role, {})
        sizes[pattern] = None if fitting is None else min(sizes.get(pattern) or fitting, fitting)
    return found


def _target(options: Shorthand) -> dict[str, object]:
    """The output that a size stands for. Raises `RecipeError`."""
    for option, value in (("--scheme", options.scheme), ("--preset", options.preset)):
        if value is not None:
            raise RecipeError(f"found {option} and {options.target.words[0]}, needed one of them.")
    if options.group_size is not None:
        raise RecipeError("--group-size: belongs to --scheme; with a size, group sizes are chosen.")
    if options.method is not None and options.method not in METHODS:
        raise RecipeError(_foreign_method(options.method))
    return options.target.output()


def _match(wanted: Sequence[Role], roles: set[Role]) -> str:
    return "role:" + "|".join(role.value for role in wanted if role in roles)


def _calibration(options: Shorthand, arch: ModelArch) -> Mapping[str, object]:
    many = routed_experts(arch) > MANY_EXPERTS
    usual = TOKENS_OF_MANY_EXPERTS if options.data and many else TOKENS
    length = min(SEQUENCE_LENGTH, arch.serving().max_positions)
    return {
        "data": list(options.data or (MIXED,)),
        "tokens": usual if options.tokens is None else options.tokens,
        "sequence_length": length,
    }


def _stored(options: Shorthand) -> _Widths | _Float | str:
    """What a scheme says, or the name of a preset. Raises `RecipeError`."""
    if options.scheme is not None and options.preset is not None:
        raise RecipeError("found --scheme and --preset, needed one of them.")
    if options.method is not None and options.method not in METHODS:
        raise RecipeError(_foreign_method(options.method))
    if options.scheme is not None:
        plain = _plain(options.scheme)
        if plain == _FP8_INPUTS:
            _check_own_groups(plain, options.group_size)
            return _Widths(4, 8, 128, fp8_inputs=True)
        kind = _FLOATS.get(plain)
        return _widths(options.scheme, options.group_size) if kind is None else _float(kind, options.group_size)
    if options.preset is None:
        raise RecipeError("found neither --scheme nor --preset, needed one of them, such as --scheme w4a16.")
    if options.group_size is not None:
        raise RecipeError("--group-size: belongs to --scheme; the block types of a preset have sizes of their own.")
    return _preset(options.preset)


def _float(kind: str, group_size: int | None) -> _Float:
    _check_own_groups(kind, group_size)
    return _Float(kind)


def _check_own_groups(kind: str, group_size: int | None) -> None:
    if group_size is not None:
        raise RecipeError(f"--group-size: belongs to integers; {kind} has groups of its own.")


def _widths(scheme: str, group_size: int | None) -> _Widths:
    found = _SCHEME.fullmatch(scheme.lower().replace("_", "-"))
    if found is None:
        raise RecipeError(f"--scheme {_shown(scheme)}: {_no_scheme(scheme)}")
    named = int(found[3]) if found[3] else -1 if found[4] else None
    if named is not None and group_size is not None and named != group_size:
        raise RecipeError(f"--scheme {scheme} and --group-size {group_size}: name two group sizes, needed one.")
    size = next((size for size in (named, group_size) if size is not None), 128)
    if size != -1 and size < 8:
        raise RecipeError(f"--group-size: found {size}, needed -1 (one scale a row) or at least 8, such as 128.")
    bits = int(found[1])
    return _Widths(bits, bits if found[2] or found[5] else 8, None if size == -1 else size)


def _preset(name: str) -> str:
    """The preset's name as llama-quantize writes it."""
    found = _PRESETS.get(_plain(name))
    if found is not None:
        return found
    if _SCHEME.fullmatch(name.lower().replace("_", "-")):
        raise RecipeError(f"--preset {_shown(name)}: is a scheme; take --scheme {name.lower()}.")
    guess = nearest(name, tuple(FILE_TYPES))
    said = _foreign(name) or f"is no preset, needed one of {', '.join(FILE_TYPES)}"
    raise RecipeError(f"--preset {_shown(name)}: {said}{f' (did you mean {guess}?)' if guess else ''}.")


def _no_scheme(name: str) -> str:
    """What an unknown scheme is called here, in one sentence."""
    preset = _PRESETS.get(_plain(name))
    if preset is not None:
        return f"is a mix of llama-quantize; take --preset {preset}, which writes GGUF."
    said = _foreign(name)
    if said:
        return f"{said}."
    guess = nearest(name, (*SCHEMES, *dict.fromkeys(_FLOATS.values())))
    meant = f" (did you mean {guess}?)" if guess else ""
    return (
        f"is no scheme{meant}, needed one of {', '.join(SCHEMES)}, each also with -all (every linear as narrow as "
        "the experts) and -gN (group size), w4afp8, nvfp4, mxfp4 or mxfp8."
    )


def _foreign(name: str) -> str:
    """What another tool's name stands for and the nearest thing here, "" for an unknown name."""
    for names, (what, instead) in _FOREIGN.items():
        if _plain(name) in names:
            return f"is {what}; the nearest here is {instead}"
    return ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _foreign_method(method: str) -> str:
    plain, shown = _plain(method), f"--method {_shown(method)}"
    if plain in ("awq", "autoawq", "llmawq"):
        return f"{shown}: is called --method awq here."
    if plain in ("autogptq", "gptqmodel", "autoround", "gptaq", "ldlq", "obq", "optq"):
        return f"{shown}: is another tool's name; the nearest here is --method gptq."
    if plain in ("roundtonearest", "nearest", "minmax", "datafree", "none"):
        return f"{shown}: is called --method rtn here (round to nearest, data-free)."
    if plain in ("repack", "lossless", "passthrough"):
        return f"{shown}: belongs to rules that name what they repack; take a recipe, such as -r repack-int4-gguf."
    guess = nearest(method, METHODS)
    meant = f" (did you mean {guess}?)" if guess else ""
    return f"{shown}: is no method{meant}, needed gptq or awq (calibrated), or rtn (round to nearest, data-free)."


def _shown(text: str) -> str:
    return text[:40] if text.isprintable() else ascii(text[:40])
