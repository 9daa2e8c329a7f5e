"""The mixes of llama-quantize: whole-model sizes to the byte, and its rules read once more from the C code."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_gguf import stored_name
from quantkit.errors import PlanError
from quantkit.formats.gguf.types import WRITABLE
from quantkit.runtimes.llama_cpp.presets import (
    FILE_TYPES,
    PRESETS,
    downs_before,
    fitting_type,
    is_quantised,
    preset_type,
)

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QUANTKIT_SHARED") or ROOT.parent / "shared") / "models"

Shapes = dict[str, tuple[int, ...]]


def stored_shapes(config: dict[str, Any], *, mtp: bool = False) -> Shapes:
    """GGUF name -> shape in numpy's order: experts stacked, kv_b in two parts."""
    return shapes_of(json.dumps(config), mtp)


@functools.cache
def shapes_of(config: str, mtp: bool) -> Shapes:
    arch = DeepseekV3(json.loads(config))
    parts = list(arch.parts().values())
    cut = {part.whole for part in parts}
    whole = [spec for spec in arch.tensors() if spec.name not in cut]
    shapes: Shapes = {}
    for entry in (*whole, *parts):
        name, place = stored_name(entry.name)
        if mtp or not name.startswith("blk.") or int(name.split(".")[1]) < arch.n_layers:
            shapes[name] = entry.shape if place is None else (arch.config.n_routed_experts, *entry.shape)
    return shapes


def planned(preset: str, config: dict[str, Any], *, importance: bool = False, mtp: bool = False) -> dict[str, str]:
    """The type of every tensor of the file; what is left alone is F32, as llama.cpp's converter stores it."""
    n_layers = config["num_hidden_layers"] + (config["num_nextn_predict_layers"] if mtp else 0)
    types: dict[str, str] = {}
    downs = downs_before(stored_shapes(config, mtp=mtp))
    for name, shape in stored_shapes(config, mtp=mtp).items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        kind = preset_type(
            preset,
            name,
            shape,
            layer=layer,
            n_layers=n_layers,
            n_experts=config["n_routed_experts"],
            importance=importance,
            downs=downs.get(name, 0),
        )
        types[name] = kind or "F32"
    return types


def total_bytes(types: dict[str, str], config: dict[str, Any]) -> int:
    return sum(WRITABLE[types[name]].data_bytes(shape) for name, shape in stored_shapes(config).items())


def v3() -> dict[str, Any]:
    return json.loads((ROOT / "examples" / "deepseek-v3-671b" / "config.json").read_text())


@pytest.mark.parametrize(
    ("preset", "nbytes"),
    [
        ("Q4_K_M", 404_488_847_360),
        ("Q4_K_S", 380_060_532_736),
        ("IQ4_XS", 359_559_284_736),
        ("Q6_K", 550_916_951_552),
        ("Q8_0", 713_281_210_368),
    ],
)
def test_tensor_data_of_deepseek_v3_to_the_byte(preset: str, nbytes: int) -> None:
    """The figures are llama-quantize's own, without an importance matrix."""
    assert total_bytes(planned(preset, v3()), v3()) == nbytes


TINY = SHARED / "tiny-deepseek-v3" / "config.json"


@pytest.mark.skipif(not TINY.exists(), reason="needs the shared models (QUANTKIT_SHARED)")
@pytest.mark.parametrize(
    ("preset", "projections", "everything"),
    [
        ("Q4_K_M", 13_188_608, 25_886_592),
        ("Q4_K_S", 12_343_808, 25_041_792),
        ("IQ4_XS", 11_601_152, 24_299_136),
        ("Q3_K_M", 10_402_496, 23_100_480),
        ("Q3_K_S", 9_453_760, 22_151_744),
        ("Q2_K", 8_031_872, 20_729_856),
    ],
)
def test_tensor_data_of_the_tiny_model(preset: str, projections: int, everything: int) -> None:
    """Measured from llama-quantize's files, made with an importance matrix, embeddings and head kept in F32."""
    config = json.loads(TINY.read_text())
    types = planned(preset, config, importance=True) | {"token_embd.weight": "F32", "output.weight": "F32"}
    shapes = stored_shapes(config)
    assert total_bytes(types, config) == everything
    quantised = [name for name in shapes if is_quantised(name, shapes[name]) and name.startswith("blk.")]
    assert sum(WRITABLE[types[name]].data_bytes(shapes[name]) for name in quantised) == projections


def test_types_of_deepseek_v3() -> None:
    types = planned("Q4_K_M", v3())
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_K"
    assert types["blk.5.attn_k_b.weight"] == "Q5_0"  # rows of 128
    assert types["blk.5.attn_v_b.weight"] == types["blk.5.attn_output.weight"] == "Q4_K"
    assert types["blk.5.ffn_gate_inp.weight"] == types["blk.5.attn_norm.weight"] == "F32"
    assert types["blk.5.exp_probs_b.bias"] == "F32"
    more = [layer for layer in range(3, 61) if types[f"blk.{layer}.ffn_down_exps.weight"] == "Q6_K"]
    assert more == [layer for layer in range(3, 61) if layer < 7 or layer >= 53 or (layer >= 9 and layer % 3 == 0)]
    assert types["blk.6.ffn_down_shexp.weight"] == types["blk.2.ffn_down.weight"] == "Q6_K"
    assert Counter(types.values())["F32"] == 61 * 4 + 1 + 2 * 58


def test_mtp_layer_counts_as_a_layer_and_its_tables_are_plain() -> None:
    types = planned("Q4_K_M", v3(), mtp=True)
    assert types["blk.61.nextn.eh_proj.weight"] == types["blk.61.nextn.shared_head_head.weight"] == "Q4_K"
    assert types["blk.61.nextn.embed_tokens.weight"] == "Q4_K"
    assert types["blk.61.nextn.shared_head_norm.weight"] == types["blk.61.nextn.enorm.weight"] == "F32"
    assert types["blk.61.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.53.ffn_down_exps.weight"] == "Q4_K"  # 7 * 62 // 8 is 54


def test_what_an_importance_matrix_changes() -> None:
    down = "blk.0.ffn_down.weight"
    pairs = {preset: (planned(preset, v3())[down], planned(preset, v3(), importance=True)[down]) for preset in PRESETS}
    assert {preset: pair for preset, pair in pairs.items() if pair[0] != pair[1]} == {
        "Q4_0": ("Q4_0", "Q4_1"),
        "Q5_0": ("Q5_0", "Q5_1"),
        "IQ4_NL": ("Q5_K", "IQ4_NL"),
        "IQ4_XS": ("Q5_K", "IQ4_XS"),
        "IQ3_XXS": ("Q4_K", "IQ3_XXS"),
    }


def test_mxfp4_takes_every_stacked_tensor() -> None:
    """Even the halves of kv_b_proj: llama-quantize asks for three dimensions only."""
    types = planned("MXFP4_MOE", v3())
    assert {name.split(".", 2)[-1] for name, kind in types.items() if kind == "MXFP4"} == {
        "attn_k_b.weight",
        "attn_v_b.weight",
        "ffn_gate_exps.weight",
        "ffn_up_exps.weight",
        "ffn_down_exps.weight",
    }
    assert set(types.values()) == {"MXFP4", "Q8_0", "F32"}


def test_i_quants_of_three_bits() -> None:
    xxs = planned("IQ3_XXS", v3(), importance=True)
    assert (xxs["output.weight"], xxs["token_embd.weight"]) == ("Q5_K", "IQ3_S")
    assert xxs["blk.9.attn_output.weight"] == "IQ3_S"
    assert xxs["blk.9.ffn_down_exps.weight"] == xxs["blk.9.attn_q_b.weight"] == "IQ3_XXS"
    assert xxs["blk.9.attn_k_b.weight"] == "IQ4_NL"
    xs = planned("IQ3_XS", v3(), importance=True)
    assert {xs[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(7, 53)} == {"IQ3_XXS"}
    assert {xs[f"blk.{layer}.ffn_up_exps.weight"] for layer in (3, 6, 53, 60)} == {"IQ3_S"}
    assert set(planned("IQ3_S", v3(), importance=True).values()) == {"IQ3_S", "IQ4_NL", "Q6_K", "F32"}


@pytest.mark.parametrize("preset", ["F32", "F16", "BF16"])
def test_plain_files(preset: str) -> None:
    types = planned(preset, v3())
    assert set(types.values()) == {preset, "F32"}
    assert types["output.weight"] == types["blk.0.attn_k_b.weight"] == preset


def tensor_type(preset: str, name: str, shape: tuple[int, ...], **changes: Any) -> str | None:
    arguments: dict[str, Any] = {"layer": 3, "n_layers": 8, "n_experts": 16, "importance": False}
    return preset_type(preset, name, shape, **{**arguments, **changes})


def test_head_and_tied_embeddings() -> None:
    assert tensor_type("Q4_K_M", "output.weight", (99, 512), layer=None) == "Q6_K"
    assert tensor_type("Q4_K_M", "output.weight", (99, 288), layer=None) == "Q8_0"  # 288 is no multiple of 256
    assert tensor_type("Q4_0", "output.weight", (99, 288), layer=None) == "Q8_0"  # Q6_K by the mix, then the fallback
    assert tensor_type("Q4_K_M", "token_embd.weight", (99, 512), layer=None) == "Q4_K"
    assert tensor_type("Q4_K_M", "token_embd.weight", (99, 512), layer=None, tied=True) == "Q6_K"
    assert tensor_type("IQ3_XXS", "token_embd.weight", (99, 512), layer=None, tied=True) == "Q5_K"


def test_mixtral_s_number_of_experts() -> None:
    assert tensor_type("Q4_K_M", "blk.3.attn_output.weight", (512, 512), n_experts=8) == "Q5_K"
    assert tensor_type("Q3_K_L", "blk.3.attn_output.weight", (512, 512), n_experts=8) == "Q3_K"
    assert tensor_type("Q3_K_L", "blk.3.attn_output.weight", (512, 512)) == "Q5_K"
    assert tensor_type("IQ3_M", "blk.3.ffn_down.weight", (512, 512), n_experts=8) == "Q4_K"
    assert tensor_type("IQ3_M", "blk.4.ffn_down.weight", (512, 512), n_experts=8, layer=4) == "IQ3_S"


def test_left_alone() -> None:
    for name, shape in {
        "blk.3.attn_norm.weight": (512,),
        "blk.3.ffn_gate_inp.weight": (16, 512),
        "blk.3.exp_probs_b.bias": (16, 512),
        "blk.3.attn_q_a_norm.weight": (2, 512),
        "blk.3.attn_q_a.weight": (1, 512),  # ggml counts dimensions that are larger than 1
    }.items():
        assert tensor_type("Q4_K_M", name, shape) is None
        assert tensor_type("BF16", name, shape) is None


@pytest.mark.parametrize("name", ["attn_qkv.weight", "attn_kv_b.weight"])
def test_fused_attention_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"fused in one tensor\. "):
        tensor_type("Q4_K_M", f"blk.3.{name}", (512, 512))


def test_mixes_below_three_bits_count_tensors() -> None:
    """A layer of experts has two ffn_down tensors, so the first eighth of 61 ends with the fifth layer."""
    types = planned("IQ2_XXS", v3(), importance=True)
    downs = {name: kind for name, kind in types.items() if "ffn_down" in name and kind == "Q2_K"}
    assert sorted(downs) == [
        *(f"blk.{layer}.ffn_down.weight" for layer in range(3)),
        *(f"blk.{layer}.ffn_down_{part}.weight" for layer in (3, 4) for part in ("exps", "shexp")),
    ]


def test_mixes_below_three_bits() -> None:
    types = {name: planned(name, v3(), importance=True) for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M")}
    assert {kinds["output.weight"] for kinds in types.values()} == {"Q5_K"}
    assert {name: kinds["token_embd.weight"] for name, kinds in types.items() if name != "IQ2_M"} == dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"
    )
    assert {name: kinds["blk.9.attn_output.weight"] for name, kinds in types.items()} == {
        "IQ1_S": "IQ2_XXS",
        "IQ1_M": "IQ2_XXS",
        "IQ2_XXS": "IQ2_XXS",
        "IQ2_XS": "IQ2_XS",
        "IQ2_M": "IQ3_S",
    }
    small = planned("IQ2_S", v3(), importance=True)
    assert Counter(small.values())["IQ2_XS"] > 500
    assert {kind for kind in small.values() if kind in ("IQ2_S", "Q2_K")} == set()
    assert set(planned("Q2_0", v3()).values()) == {"Q2_0", "Q4_K", "Q6_K", "F32"}


@pytest.mark.parametrize(
    ("kind", "in_features", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 128, "Q5_0"),
        ("Q5_K", 128, "Q5_1"),
        ("Q6_K", 128, "Q8_0"),
        ("Q3_K", 128, "Q4_0"),
        ("Q2_K", 128, "Q4_0"),
        ("IQ3_XXS", 128, "IQ4_NL"),
        ("IQ3_S", 128, "IQ4_NL"),
        ("IQ4_XS", 128, "IQ4_NL"),
        ("IQ2_XS", 128, "IQ4_NL"),
        ("IQ1_M", 16, "F16"),
        ("Q2_0", 64, "Q2_0"),
        ("Q2_0", 96, "Q4_0"),
        ("Q4_K", 16, "F16"),
        ("Q8_0", 16, "F16"),
        ("MXFP4", 48, "F16"),
        ("F32", 7, "F32"),
        ("BF16", 7, "BF16"),
    ],
)
def test_rows_that_are_not_whole_blocks(kind: str, in_features: int, expected: str) -> None:
    assert fitting_type(kind, in_features) == expected


def test_every_type_that_quantkit_writes_has_something_that_fits() -> None:
    for kind in WRITABLE:
        for in_features in (1, 32, 96, 128, 256, 1408):
            fitting = WRITABLE[fitting_type(kind, in_features)]
            assert in_features % fitting.block == 0


def test_file_types_are_gguf_py_s() -> None:
    """Which has no Q2_0 yet."""
    names = {"F32": "ALL_F32"} | {preset: f"MOSTLY_{preset}" for preset in PRESETS if preset not in ("F32", "Q2_0")}
    assert {preset: int(gguf.LlamaFileType[name]) for preset, name in names.items()} | {"Q2_0": 41} == FILE_TYPES
