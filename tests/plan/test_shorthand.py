"""Options that stand for a recipe: what they mean on a model, and what they are called where they are unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import quantkit
from quantkit import api
from quantkit.arch import arch_of
from quantkit.calibrate.counts import parse_count
from quantkit.errors import RecipeError
from quantkit.formats.source import read_config
from quantkit.plan.plan import RoleSize
from quantkit.plan.recipe import FolderOutput, GgufOutput, Recipe
from quantkit.plan.shorthand import TOKENS, Shorthand, recipe_yaml, shorthand_recipe
from quantkit.plan.target_words import TargetWords
from quantkit.plan.text_notes import TOKENS_OF_MANY_EXPERTS, text_notes
from quantkit.schemes import IntScheme, W4AFp8Scheme
from tests.tiny_models import tiny_config

ROOT = Path(__file__).parent.parent.parent
V3 = ROOT / "examples" / "deepseek-v3-671b"
NANO = ROOT / "examples" / "nano-deepseek-v3"
FELT = TargetWords(fit="5xA100-80GB", sensitivity="felt")


def stored(source: Path, options: Shorthand) -> dict[str, str]:
    """How each role with a scheme is stored."""
    (output,) = api.plan(source, shorthand_recipe(source, options)).outputs
    return {size.role.value: size.what for size in output.sizes if size.what[:3] == "int"}


def dense(folder: Path) -> Path:
    """A model whose layers are all dense."""
    folder.mkdir()
    config = tiny_config(num_nextn_predict_layers=0, first_k_dense_replace=2, num_hidden_layers=2)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_w4a16_of_v3_is_the_shipped_recipe() -> None:
    def sizes(recipe: Recipe) -> tuple[RoleSize, ...]:
        return api.plan(V3, recipe).outputs[0].sizes

    shipped = Recipe.from_yaml("deepseek-v3-w4a16-gptq")
    assert sizes(shorthand_recipe(V3, Shorthand("w4a16"))) == sizes(shipped)
    gguf = Recipe.from_yaml("deepseek-v3-gguf-q4_k_m")
    assert sizes(shorthand_recipe(V3, Shorthand(preset="q4_k_m"))) == sizes(gguf)


@pytest.mark.parametrize(
    ("scheme", "group_size", "experts", "others"),
    [
        ("w4a16", None, "int4 g128", "int8 g128"),
        ("W4A16", 64, "int4 g64", "int8 g64"),
        ("w4a16-g32", None, "int4 g32", "int8 g32"),
        ("w4a16", -1, "int4 channel", "int8 channel"),
        ("w4a16_channel", None, "int4 channel", "int8 channel"),
        ("w4a16-all", None, "int4 g128", "int4 g128"),
        ("w3a16-g64-all", None, "int3 g64", "int3 g64"),
        ("w3a16", None, "int3 g128", "int8 g128"),
        ("w8a16", None, "int8 g128", "int8 g128"),
    ],
)
def test_widths_of_schemes(scheme: str, group_size: int | None, experts: str, others: str) -> None:
    found = stored(NANO, Shorthand(scheme, group_size=group_size))
    assert found == {
        "expert": f"{experts} gptq",
        **dict.fromkeys(("attention", "mlp", "shared_expert"), f"{others} gptq"),
    }


def test_a_dense_model_is_narrow_throughout(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense")
    assert set(stored(source, Shorthand("w4a16-g32")).values()) == {"int4 g32 gptq"}
    (output,) = shorthand_recipe(source, Shorthand("w4a16")).outputs
    assert [rule.match for rule in output.rules] == ["role:norm|embed|lm_head", "role:mlp|attention"]
    (note,) = api.plan(source, shorthand_recipe(source, Shorthand("w4a16-g32"))).warnings
    assert "o_proj: 128 inputs are 4 groups of 32" in note


def test_text_and_method() -> None:
    own = shorthand_recipe(V3, Shorthand("w4a16", data=("a.txt", "b.jsonl"))).calibration
    assert own is not None
    assert own.data == ("a.txt", "b.jsonl")
    assert own.tokens == TOKENS_OF_MANY_EXPERTS
    built_in = shorthand_recipe(V3, Shorthand("w4a16")).calibration
    assert built_in is not None
    assert (built_in.data, built_in.tokens, built_in.sequence_length) == (("builtin:mixed",), TOKENS, 2048)
    data_free = shorthand_recipe(NANO, Shorthand("w4a16", method="rtn"))
    assert data_free.calibration is None
    (output,) = data_free.outputs
    assert output.method is not None
    assert output.method.kind == "rtn"
    assert shorthand_recipe(NANO, Shorthand("w4a16", method="rtn", tokens=4096)).calibration is not None


@pytest.mark.parametrize(
    "options",
    [
        Shorthand("w4a16"),
        Shorthand("w3a16", group_size=-1, method="gptq", data=("text/*.txt",), tokens=4096),
        Shorthand("w8a16", method="rtn"),
        Shorthand("w4a16", method="awq"),
        Shorthand(target=replace(FELT, context=65536)),
        Shorthand(target=TargetWords(target_size="350GB", format="gguf", sensitivity="felt")),
        Shorthand(preset="IQ4_xs", data=("a b.txt",)),
    ],
    ids=lambda options: options.what,
)
def test_the_printed_recipe_is_the_recipe(options: Shorthand, tmp_path: Path) -> None:
    recipe = shorthand_recipe(V3, options)
    path = tmp_path / "printed.yaml"
    path.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert Recipe.from_yaml(path).within(".") == recipe
    assert list(yaml.safe_load(path.read_text())) == [
        key for key in Recipe.model_fields if key in recipe.model_fields_set
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("nvfp4", "nvfp4"), ("NVFP4A16", "nvfp4"), ("mxfp4", "mxfp4"), ("MXFP8", "mxfp8")]
)
def test_a_float_scheme_is_for_all_linears(name: str, kind: str) -> None:
    (output,) = shorthand_recipe(V3, Shorthand(name)).outputs
    assert (output.name, output.format) == (kind, "compressed-tensors")
    dropped, kept, quantised = output.rules
    assert (dropped.match, kept.keep) == ("role:mtp", "source")
    assert quantised.scheme is not None
    assert (quantised.match, quantised.scheme.kind) == ("role:expert|shared_expert|mlp|attention", kind)
    with pytest.raises(RecipeError, match=f"--group-size: belongs to integers; {kind} has groups"):
        shorthand_recipe(V3, Shorthand(name, group_size=32))


def test_fp8_inputs_are_for_routed_experts_beside_int8() -> None:
    (output,) = shorthand_recipe(V3, Shorthand("W4AFP8")).outputs
    (plain,) = shorthand_recipe(V3, Shorthand("w4a16")).outputs
    assert output.name == "w4afp8"
    changed = [(a.scheme, b.scheme) for a, b in zip(output.rules, plain.rules, strict=True) if a != b]
    assert changed == [(W4AFp8Scheme(), IntScheme())]
    with pytest.raises(RecipeError, match="--group-size: belongs to integers; w4afp8 has groups"):
        shorthand_recipe(V3, Shorthand("w4afp8", group_size=64))


def test_outputs_are_named_after_what_they_are() -> None:
    (scheme,) = shorthand_recipe(V3, Shorthand("w4a16", group_size=32)).outputs
    assert isinstance(scheme, FolderOutput)
    assert scheme.name == "w4a16-g32"
    (preset,) = shorthand_recipe(V3, Shorthand(preset="q5_k")).outputs
    assert isinstance(preset, GgufOutput)
    assert (preset.name, preset.preset, preset.mtp) == ("Q5_K_M", "Q5_K_M", "drop")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Shorthand("nf4"), "bitsandbytes NF4, which only a recipe's rules write; the nearest here is --scheme w4a16."),
        (Shorthand("AWQ"), "a method; the nearest here is --scheme w4a16 --method awq."),
        (
            Shorthand("fp4"),
            "the name of several formats, which only a recipe's rules write; the nearest here is --scheme w4a16.",
        ),
        (Shorthand("auto_gptq"), "the nearest here is --scheme w4a16 --method gptq."),
        (Shorthand("int4"), "the nearest here is --scheme w4a16."),
        (Shorthand("4bit"), "the nearest here is --scheme w4a16."),
        (Shorthand("q4_k_m"), "take --preset Q4_K_M"),
        (Shorthand("w9a16"), "is no scheme (did you mean w8a16?), needed one of w4a16, w8a16"),
        (Shorthand("w4a16\n"), "is no scheme"),
        (Shorthand(preset="w4a16"), "take --scheme w4a16"),
        (Shorthand(preset="nf4"), "the nearest here is --scheme w4a16"),
        (Shorthand(preset="Q4_K_X"), "is no preset, needed one of F32, F16"),
        (Shorthand("w4a16", method="auto_awq"), "is called --method awq here."),
        (Shorthand("w4a16", method="repack"), "take a recipe, such as -r repack-int4-gguf."),
        (Shorthand("w4a16", method="auto-round"), "another tool's name; the nearest here is --method gptq."),
        (Shorthand("w4a16", method="magic"), "is no method, needed gptq"),
        (Shorthand("w4a16", preset="Q4_K_M"), "found --scheme and --preset"),
        (Shorthand("w4a16-g32", group_size=64), "name two group sizes"),
        (Shorthand("w4a16", group_size=0), "found 0, needed -1 (one scale a row) or at least 8"),
        (Shorthand(preset="Q4_K_M", group_size=64), "belongs to --scheme"),
        (Shorthand(method="gptq"), "found neither --scheme nor --preset"),
        (Shorthand(target=TargetWords(target_bpw=4.0)), "found --target-bpw, needed --sensitivity FOLDER with it."),
        (Shorthand(target=TargetWords(format="gguf")), "needed --fit, --target-bpw or --target-size with it."),
        (Shorthand("w4a16", target=FELT), "found --scheme and --fit, needed one of them."),
        (Shorthand(preset="Q4_K_M", target=FELT), "found --preset and --fit, needed one of them."),
        (Shorthand(group_size=32, target=FELT), "with a size, group sizes are chosen."),
        (Shorthand(target=replace(FELT, format="awq")), "--format: found 'awq', needed compressed-tensors or gguf."),
        (Shorthand(target=replace(FELT, fit="5xFOO")), "found '5xFOO', needed COUNTxNAME-SIZEGB such as 5xA100-80GB"),
        (Shorthand(target=replace(FELT, target_bpw=4.0)), "found bpw and gpus, needed exactly one of: size, bpw, gpus"),
        (Shorthand(method="rtn", target=FELT), "found a target in a data-free recipe, needed calibration"),
    ],
    ids=lambda value: value.what if isinstance(value, Shorthand) else "",
)
def test_what_is_unknown_gets_one_line(options: Shorthand, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        shorthand_recipe(NANO, options)
    assert said in refused.value.message
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("131072", 131072),
        ("131,072", 131072),
        ("131_072", 131072),
        ("64k", 64000),
        ("512Ki", 524288),
        ("1e5", 100000),
        ("1.5M", 1500000),
        ("2Mi", 2**21),
    ],
)
def test_counts(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "k", "0", "-5", "1.5", "64kb", "1e99", "nan", "٣"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="needed a"):
        parse_count(text)


def test_the_built_in_text_is_small_for_many_experts() -> None:
    def notes(source: Path, options: Shorthand) -> list[str]:
        recipe = shorthand_recipe(source, options)
        return text_notes(recipe, arch_of(read_config(source)))

    note, of_rank = notes(V3, Shorthand("w4a16"))
    assert note.startswith("builtin:mixed is small for 256 experts a layer: 131,072 tokens are about 4,096 an expert.")
    assert note in api.plan(V3, shorthand_recipe(V3, Shorthand("w4a16"))).warnings
    assert of_rank.startswith("an expert gets 4,096 calibration tokens on average, its gate and up projections have")
    assert "From 229,376 tokens on" in of_rank
    assert notes(V3, Shorthand("w4a16", method="rtn")) == []
    assert notes(V3, Shorthand("w4a16", method="rtn", data=("own.txt",), tokens=1000)) == []
    assert notes(V3, Shorthand("w4a16", data=("own.txt",))) == []
    assert notes(V3, Shorthand("w4a16", data=("own.txt",), tokens=229375)) != []
    assert notes(V3, Shorthand("w4a16", data=("own.txt",), tokens=229376)) == []
    assert notes(NANO, Shorthand("w4a16")) == []
    (same,) = notes(NANO, Shorthand("w4a16", data=("builtin:eval",)))
    assert same.startswith("builtin:eval calibrates and validates")


def test_a_plan_says_what_experts_get() -> None:
    found = api.plan(V3, shorthand_recipe(V3, Shorthand("w4a16", tokens=131072)))
    shown, document = quantkit.text(found), quantkit.document(found)
    assert "text    131,072 tokens: 4,096 an expert on average (8 of 256 take a token)" in shown
    assert document["expert_tokens"] == {
        "calibration_tokens": 131072,
        "experts": 256,
        "top_k": 8,
        "mean": 4096,
        "inputs": 7168,
        "calibration_tokens_for_full_rank": 229376,
    }
    data_free = api.plan(V3, shorthand_recipe(V3, Shorthand("w4a16", method="rtn")))
    assert quantkit.document(data_free)["expert_tokens"] is None
    assert "an expert on average" not in quantkit.text(data_free)
