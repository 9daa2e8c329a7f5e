"""The mixes of llama-quantize: which type each tensor of a file gets under a name such as Q4_K_M.

In: a preset, a GGUF tensor name and shape. Out: the name of the type, or None for a tensor that stays as it is (F32 for
norms, router and biases). Sources, all in src/llama-quant.cpp of llama.cpp: tensor_allows_quantization,
llama_tensor_get_type_impl, tensor_type_fallback. Keys and values are in `preset_attention`; attention fused in one
tensor is refused.

llama-quantize counts ffn_down tensors where a model has fewer than two experts and parses the layer number where it has
more; both are the layer number here, equal as long as each layer has one ffn_down tensor per kind of MLP. The mixes of
IQ2 and IQ1 always count: layers with a shared expert have two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quantkit.errors import PlanError
from quantkit.formats.gguf.types import WRITABLE
from quantkit.runtimes.llama_cpp.preset_attention import AttentionSizes, key_type, value_type

Layers = Callable[[int, int], bool]
"""(layer, layers of the file) -> whether a rule holds there."""
Rules = tuple[tuple[Layers, str], ...]
"""The first whose layers match gives the type; none: the preset's default."""


def _first(part: int) -> Layers:
    return lambda layer, n_layers: layer < n_layers // part


def _more_bits(layer: int, n_layers: int) -> bool:
    """use_more_bits: the first and last eighth, and every third layer between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _middle(layer: int, n_layers: int) -> bool:
    return n_layers // 8 <= layer < 7 * n_layers // 8


def _every(layer: int, n_layers: int) -> bool:
    return layer < n_layers


@dataclass(frozen=True, slots=True)
class Preset:
    """One mix. ``file_type``: enum llama_ftype; ``default``: the type of what no other field names.

    ``output``: of the head (where embeddings are tied: of the embeddings). ``embed``, ``query``, ``attn_output``:
    None is the default. ``down``: of ffn_down, ffn_down_exps and ffn_down_shexp; ``weighted_down``: the same with an
    importance matrix, where it differs. ``gate_up``: of the other MLP tensors. ``stacked``: of 3-D tensors.
    ``eight``: Mixtral's rule, Q5_K for attn_output where there are exactly eight experts. ``counted``: the layers of
    ``down`` are the tensors before it whose names have ffn_down.
    """

    file_type: int
    default: str
    output: str = "Q6_K"
    embed: str | None = None
    query: str | None = None
    attn_output: str | None = None
    down: Rules = ()
    weighted_down: Rules | None = None
    gate_up: Rules = ()
    stacked: str | None = None
    eight: bool = False
    counted: bool = False


def _low(file_type: int, default: str, *, first: str, embed: str, attn_output: str | None = None) -> Preset:
    """The mixes of IQ2 and IQ1: ``first`` for the first eighth of ffn_down."""
    down = ((_first(8), first),)
    return Preset(
        file_type,
        default,
        output="Q5_K",
        embed=embed,
        attn_output=attn_output,
        down=down,
        eight=True,
        counted=True,
    )


PRESETS: dict[str, Preset] = {
    "F32": Preset(0, "F32"),
    "F16": Preset(1, "F16"),
    "Q4_0": Preset(2, "Q4_0", weighted_down=((_first(8), "Q4_1"),)),
    "Q4_1": Preset(3, "Q4_1"),
    "Q8_0": Preset(7, "Q8_0", output="Q8_0"),
    "Q5_0": Preset(8, "Q5_0", weighted_down=((_first(8), "Q5_1"),)),
    "Q5_1": Preset(9, "Q5_1"),
    "Q2_K": Preset(10, "Q2_K", attn_output="Q3_K", down=((_every, "Q3_K"),), eight=True),
    "Q3_K_S": Preset(11, "Q3_K", eight=True),
    "Q3_K_M": Preset(12, "Q3_K", attn_output="Q4_K", down=((_first(16), "Q5_K"), (_every, "Q4_K")), eight=True),
    "Q3_K_L": Preset(13, "Q3_K", attn_output="Q5_K", down=((_every, "Q5_K"),)),
    "Q4_K_S": Preset(14, "Q4_K", down=((_first(8), "Q5_K"),), eight=True),
    "Q4_K_M": Preset(15, "Q4_K", down=((_more_bits, "Q6_K"),), eight=True),
    "Q5_K_S": Preset(16, "Q5_K"),
    "Q5_K_M": Preset(17, "Q5_K", down=((_more_bits, "Q6_K"),)),
    "Q6_K": Preset(18, "Q6_K"),
    "IQ2_XXS": _low(19, "IQ2_XXS", first="Q2_K", embed="Q2_K"),
    "IQ2_XS": _low(20, "IQ2_XS", first="Q2_K", embed="Q2_K"),
    "Q2_K_S": Preset(21, "Q2_K", down=((_first(8), "Q4_K"),)),
    "IQ3_XS": Preset(22, "IQ3_S", query="IQ3_XXS", gate_up=((_middle, "IQ3_XXS"),), eight=True),
    "IQ3_XXS": Preset(
        23,
        "IQ3_XXS",
        output="Q5_K",
        embed="IQ3_S",
        query="IQ2_S",
        attn_output="IQ3_S",
        down=((_first(8), "Q4_K"), (_every, "Q3_K")),
        weighted_down=(),
        eight=True,
    ),
    "IQ1_S": _low(24, "IQ1_S", first="Q2_K", embed="Q2_K", attn_output="IQ2_XXS"),
    "IQ4_NL": Preset(25, "IQ4_NL", down=((_first(8), "Q5_K"),), weighted_down=(), eight=True),
    "IQ3_S": Preset(26, "IQ3_S", eight=True),
    "IQ3_M": Preset(27, "IQ3_S", attn_output="Q4_K", down=((_first(8), "Q4_K"),), eight=True),
    "IQ2_S": _low(28, "IQ2_XS", first="IQ3_S", embed="IQ3_S", attn_output="IQ3_S"),
    "IQ2_M": _low(29, "IQ2_S", first="IQ3_S", embed="IQ3_S", attn_output="IQ3_S"),
    "IQ4_XS": Preset(30, "IQ4_XS", down=((_first(8), "Q5_K"),), weighted_down=(), eight=True),
    "IQ1_M": _low(31, "IQ1_M", first="Q2_K", embed="Q2_K", attn_output="IQ2_XXS"),
    "BF16": Preset(32, "BF16"),
    "MXFP4_MOE": Preset(38, "Q8_0", output="Q8_0", stacked="MXFP4"),
    "Q2_0": Preset(41, "Q2_0", embed="Q4_K"),
}
"""By llama-quantize's name."""

FILE_TYPES: dict[str, int] = {name: preset.file_type for name, preset in PRESETS.items()}
"""general.file_type (enum llama_ftype) of each preset."""

_SMALLER = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_0": "Q4_0",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Type of blocks of 256 or 64 -> type of blocks of 32."""

NEED_IMPORTANCE = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Types that llama-quantize refuses to make without an importance matrix (tensor_requires_imatrix)."""

_FUSED_ATTENTION = ("attn_qkv.weight", "attn_kv_b.weight")
_ALONE = AttentionSizes()


def fitting_type(kind: str, in_features: int) -> str:
    """``kind``, or what llama-quantize takes in its place for rows that are not whole blocks: a type of blocks of 32,
    else F16."""
    if in_features % WRITABLE[kind].block:
        kind = _SMALLER.get(kind, kind)
    return "F16" if in_features % WRITABLE[kind].block else kind


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize touches the tensor. ``shape`` in numpy's order; dimensions of 1 in front do not count."""
    if len(shape) < 2 or max(shape[:-1]) == 1:
        return False
    return name.endswith("weight") and "_norm.weight" not in name and "ffn_gate_inp.weight" not in name


def preset_type(
    preset: str,
    name: str,
    shape: tuple[int, ...],
    *,
    layer: int | None,
    n_layers: int,
    n_experts: int,
    importance: bool,
    tied: bool = False,
    downs: int = 0,
    attention: AttentionSizes = _ALONE,
) -> str | None:
    """The type that llama-quantize gives a tensor under ``preset`` (a key of `PRESETS`); None: it is left as it is.

    ``shape``: numpy's order, rows last. ``layer``: of the name, None outside blocks; ``n_layers``: all blocks of the
    file, MTP included. ``importance``: with an importance matrix. ``tied``: the file has no output.weight.
    ``downs``: of an ffn_down tensor, how many others come before it (`downs_before`). ``attention``: how many queries
    share a key.
    Raises PlanError for tensors of other families.
    """
    if not is_quantised(name, shape):
        return None
    mix = PRESETS[preset]
    if mix.default in ("F32", "F16", "BF16"):
        return mix.default
    if "attn_k.weight" in name or "attn_v.weight" in name:
        kind = _key_or_value(preset, name, attention, layer, n_layers, n_experts, importance=importance)
        return fitting_type(kind, shape[-1])
    kind = _mixed(
        mix,
        name,
        shape,
        layer=downs if mix.counted and "ffn_down" in name else layer,
        n_layers=n_layers,
        n_experts=n_experts,
        importance=importance,
        tied=tied,
    )
    return fitting_type(kind, shape[-1])


def _key_or_value(
    preset: str,
    name: str,
    sizes: AttentionSizes,
    layer: int | None,
    n_layers: int,
    n_experts: int,
    *,
    importance: bool,
) -> str:
    mix = PRESETS[preset]
    assert layer is not None, f"{name} lies in no block"
    if mix.stacked is not None:  # what is not stacked has the default of these mixes
        return mix.default
    if "attn_k.weight" in name:
        return key_type(preset, mix.default, n_experts)
    more = _more_bits(layer, n_layers)
    return value_type(preset, mix.default, sizes, n_experts, importance=importance, layer=layer, more_bits=more)


def downs_before(names: Iterable[str]) -> dict[str, int]:
    """GGUF names of a file -> of each whose name has ffn_down, the number of those that llama-quantize meets before."""
    downs = [name for name in names if "ffn_down" in name]
    downs.sort(key=lambda name: (int(name.split(".")[1]), name))
    return {name: place for place, name in enumerate(downs)}


def _mixed(
    mix: Preset,
    name: str,
    shape: tuple[int, ...],
    *,
    layer: int | None,
    n_layers: int,
    n_experts: int,
    importance: bool,
    tied: bool,
) -> str:
    """llama_tensor_get_type_impl, in its order: head, MXFP4, embeddings, attention, MLP."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return mix.output if shape[-1] % WRITABLE[mix.default].block == 0 else "Q8_0"
    if mix.stacked is not None and len(shape) > 2 and shape[-3] > 1:
        return mix.stacked
    if name == "token_embd.weight":
        return mix.embed or mix.default
    if any(part in name for part in _FUSED_ATTENTION):
        raise PlanError(
            f"{name}: the presets of llama.cpp are not known here for attention fused in one tensor.",
            hint="Give a type by rules instead of a preset.",
        )
    if "attn_q.weight" in name:
        return mix.query or mix.default
    if "attn_output.weight" in name:
        if n_experts == 8:
            return "Q5_K" if mix.eight else mix.default
        return mix.attn_output or mix.default
    rules: Rules = ()
    if "ffn_up" in name or "ffn_gate" in name:
        rules = mix.gate_up
    elif "ffn_down" in name:
        rules = _down_rules(mix, n_experts, importance=importance)
    assert not rules or layer is not None, f"{name} lies in no block"
    return next((kind for where, kind in rules if layer is not None and where(layer, n_layers)), mix.default)


def _down_rules(mix: Preset, n_experts: int, *, importance: bool) -> Rules:
    if mix.file_type == FILE_TYPES["IQ3_M"] and n_experts == 8:
        return ((_first(8), "Q4_K"), (_more_bits, "Q4_K"))
    return mix.weighted_down if importance and mix.weighted_down is not None else mix.down
