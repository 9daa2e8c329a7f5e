"""GPTQ and AWQ folders: the bytes that gptqmodel packs, a config that says what is planned, and weights as planned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import PlanError
from quantkit.formats.bitpack import unpack
from quantkit.formats.folder import FolderLayout, FolderSink, FolderSource
from quantkit.formats.layouts import LAYOUTS
from quantkit.formats.layouts.awq_reader import ORDER
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.recipe import Recipe
from quantkit.runtimes import transformers
from quantkit.runtimes.vllm import contract
from quantkit.schemes import IntScheme, QuantError, QuantizedTensor
from quantkit.tensors import TensorInfo
from tests.convert.jobs import recipe_of, run, write_model, write_text
from tests.formats.test_compressed_tensors_config import INT4, INT8, RULES, V3, VLLM_FUSED, is_expert, plan
from tests.formats.test_other_packages import cases, golden
from tests.tiny_models import tiny_config

N_OUT, N_IN = 32, 96


def quantised(codes: Tensor, scale: Tensor, zero: Tensor, scheme: IntScheme) -> QuantizedTensor:
    stored = {"codes": codes, "scale": scale} | ({} if scheme.symmetric else {"zero_point": zero})
    return QuantizedTensor("m.weight", scheme, stored, QuantError(0.0))


def of_gptqmodel(stored: dict[str, Tensor], section: dict[str, Any]) -> QuantizedTensor:
    """What gptqmodel packed, as a quantised tensor."""
    bits, less = section["bits"], {"gptq": 1, "gptq_v2": 0}[section["checkpoint_format"]]
    codes = unpack(stored["qweight"].T.contiguous(), bits, N_IN)
    zero = unpack(stored["qzeros"], bits, N_OUT).T + less
    n_groups = len(stored["scales"])
    scheme = IntScheme(bits=bits, group_size=N_IN // n_groups, symmetric=section["sym"], scale_dtype="float16")
    return quantised(codes, stored["scales"].T, zero.contiguous(), scheme)


@pytest.mark.parametrize("case", [case for kind, case in cases() if kind == "gptq"])
def test_gptq_packs_as_gptqmodel(case: str) -> None:
    section, stored, _ = golden("gptq", case)
    packed = LAYOUTS[section["checkpoint_format"]].pack(of_gptqmodel(stored, section))
    for part in ("qweight", "qzeros", "scales") if "act_order" in case else ("qweight", "qzeros", "scales", "g_idx"):
        assert torch.equal(packed[f"m.{part}"], stored[part]), part


@pytest.mark.parametrize("case", [case for kind, case in cases() if kind == "awq"])
def test_awq_packs_as_gptqmodel(case: str) -> None:
    section, stored, _ = golden("awq", case)
    place = [ORDER.index(output) for output in range(8)]

    def codes(words: Tensor) -> Tensor:
        return unpack(words, 4, N_OUT).unflatten(1, (-1, 8))[:, :, place].flatten(1).T.contiguous()

    scheme = IntScheme(group_size=section["group_size"], symmetric=False, scale_dtype="float16")
    tensor = quantised(codes(stored["qweight"]), stored["scales"].T, codes(stored["qzeros"]), scheme)
    packed = LAYOUTS["awq"].pack(tensor)
    for part in ("qweight", "qzeros", "scales"):
        assert torch.equal(packed[f"m.{part}"], stored[part]), part


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_groups_of_zero_point_0_keep_their_weights(layout: str, bits: int, tmp_path: Path) -> None:
    """And no zero point of v1 wraps round: what is stored less one never has all bits set."""
    scheme = IntScheme(bits=bits, group_size=32, symmetric=False, scale_dtype="float32")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (N_OUT, N_IN), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (N_OUT, 3), generator=generator, dtype=torch.uint8)
    zero[:, 1], zero[0, 2] = 0, 2**bits - 1
    tensor = quantised(codes, torch.rand(N_OUT, 3, generator=generator) + 0.1, zero, scheme)
    planned = [PlannedTensor(TensorInfo("m.weight", (N_OUT, N_IN), "BF16"), scheme, None)]
    with written(LAYOUTS[layout], tmp_path, planned, tensor) as source:
        assert torch.equal(source.read("m.weight"), tensor.decode())
        stored = unpack(source.raw.read("m.qzeros"), bits, N_OUT)
        assert bool((stored == 2**bits - 1).any()) == (layout == "gptq_v2")


def written(
    layout: FolderLayout, folder: Path, planned: Sequence[PlannedTensor], tensor: QuantizedTensor
) -> FolderSource:
    from quantkit.formats.bundle import write_config

    sink = FolderSink.open(layout, folder, planned)
    sink.write(tensor)
    sink.finish()
    write_config(folder, {}, layout.config(planned))
    return FolderSource(folder, layout.reader)


# --- config.json ------------------------------------------------------------------------------------------------------


def vllm_bits(section: dict[str, Any], module: str) -> int | None:
    """vLLM's get_dynamic_override: the first pattern that matches from the start; None: not quantised."""
    for pattern, changes in section["dynamic"].items():
        if re.match(pattern[2:], module):
            return None if pattern.startswith("-:") else changes["bits"]
    return section["bits"]


INTEGER_RULES = [name for name in RULES if name not in ("fp8 attention", "chaos", "one linear")]


@pytest.mark.parametrize(
    ("config", "rule"),
    [("tiny", rule) for rule in INTEGER_RULES] + [("v3", "mtp kept"), ("v3", "experts by layer"), ("v3", "kv_b kept")],
)
def test_dynamic_says_for_every_module_what_is_planned(config: str, rule: str) -> None:
    planned = plan(tiny_config() if config == "tiny" else V3, RULES[rule])
    section = dict(LAYOUTS["gptq"].config(planned))
    bits = {t.module: t.scheme.bits if isinstance(t.scheme, IntScheme) else None for t in planned}
    modules = {t.module: bits[t.module] for t in planned if t.spec is not None and t.spec.linear}
    routers = {t.module: None for t in planned if t.module.endswith(("mlp.gate", "lm_head", "eh_proj"))}
    assert routers
    for fused, parts in VLLM_FUSED.items():
        for module in [name for name in modules if name.endswith(f".{parts[0]}") and ".experts." not in name]:
            modules[f"{module.rpartition('.')[0]}.{fused}"] = modules[module]
    blocks = {t.module.partition(".experts.")[0] + ".experts": bits[t.module] for t in planned if t.expert is not None}
    expected = modules | routers | blocks
    assert {module: vllm_bits(section, module) for module in expected} == expected
    assert section["checkpoint_format"] == "gptq"
    assert len(section["dynamic"]) < 12


def test_one_module_is_named_alone() -> None:
    section = dict(LAYOUTS["gptq_v2"].config(plan(tiny_config(), RULES["one linear"])))
    assert (section["bits"], section["checkpoint_format"]) == (8, "gptq_v2")
    assert vllm_bits(section, "model.layers.2.self_attn.o_proj") == 8
    assert vllm_bits(section, "model.layers.1.self_attn.o_proj") is None


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_nothing_quantised_has_no_section(layout: str) -> None:
    assert LAYOUTS[layout].config(plan(tiny_config(), lambda spec: None)) == {}


def test_awq_lists_whole_modules_and_whole_blocks() -> None:
    planned = plan(V3, lambda spec: None if is_expert(spec) or spec.layer == 61 else INT4)
    section = dict(LAYOUTS["awq"].config(planned))
    kept = section.pop("modules_to_not_convert")
    assert section == {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    assert {"lm_head", "model.layers.3.mlp.gate", "model.layers.3.mlp.experts", "model.layers.61.eh_proj"} <= set(kept)
    assert "model.layers.0.mlp.gate" not in kept
    assert len(kept) < 200
    assert LAYOUTS["awq"].problems(planned) == []


def test_awq_holds_one_group_size() -> None:
    (line,) = LAYOUTS["awq"].problems(plan(tiny_config(), lambda s: INT4 if is_expert(s) else IntScheme(group_size=64)))
    assert "group sizes 64 and 128 are planned, awq holds one" in line


def test_awq_refuses_what_its_readers_would_leave_out() -> None:
    names = ("a.gate", "a.gate_proj")
    planned = [
        PlannedTensor(TensorInfo(f"{name}.weight", (32, 128), "BF16"), scheme, None if scheme else "BF16")
        for name, scheme in zip(names, (None, INT4), strict=True)
    ]
    (line,) = LAYOUTS["awq"].problems(planned)
    assert line.startswith("a.gate is kept, but readers of awq would leave a.gate_proj out")


# --- plan and conversion ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    write_model(root / "model")
    write_text(root / "calibration.txt")
    return root


def int_rule(match: str = "role:attention|mlp|shared_expert|expert", **scheme: Any) -> dict[str, Any]:
    return {"match": match, "scheme": {"kind": "int", "group_size": 64, **scheme}, "method": {"kind": "rtn", "grid": 4}}


def in_layouts(recipe: Recipe, *layouts: str) -> Recipe:
    """The recipe with the rules of its one output for each layout."""
    values = recipe.model_dump(mode="json")
    (output,) = values["outputs"]
    return Recipe.model_validate({**values, "outputs": [{**output, "name": name, "format": name} for name in layouts]})


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_conversion_decodes_to_the_same_bits_in_every_layout(symmetric: bool, place: Path) -> None:
    layouts = ("compressed-tensors", "gptq", "gptq_v2", "awq")
    out = place / f"all-{symmetric}"
    report = run(place / "model", in_layouts(recipe_of(int_rule(symmetric=symmetric), tokens=None), *layouts), out)
    decoded: list[dict[str, Tensor]] = []
    for layout, made in zip(layouts, report.outputs, strict=True):
        with FolderSource(out / layout, LAYOUTS[layout].reader) as source:
            decoded.append({name: source.read(name) for name in source.infos()})
            stored = sum(info.nbytes for info in source.raw.infos().values())
        assert made.nbytes == stored
    expected, *others = decoded
    for tensors in others:
        assert set(tensors) == set(expected)
        for name, weight in expected.items():
            assert torch.equal(tensors[name], weight), name


@pytest.mark.parametrize(
    ("layout", "rule", "line"),
    [
        ("gptq", int_rule(bits=5), "gptq cannot store int5 g64: it has 2, 3, 4 and 8 bits"),
        ("awq", int_rule(bits=8), "awq cannot store int8 g64: it has 4 bits"),
        ("gptq", {**int_rule(), "scheme": {"kind": "ggml", "type": "Q4_0"}}, "gptq cannot store Q4_0"),
        ("awq", {**int_rule(), "scheme": {"kind": "ggml", "type": "Q4_0"}}, "awq cannot store Q4_0"),
    ],
)
def test_the_plan_refuses_what_a_layout_cannot_hold(layout: str, rule: dict[str, Any], line: str, place: Path) -> None:
    with pytest.raises(PlanError) as refused:
        run(place / "model", in_layouts(recipe_of(rule, tokens=None), layout), place / "refused")
    assert line in refused.value.message
    assert "format: " in refused.value.hint


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_rows_of_whole_words_are_needed(layout: str) -> None:
    with pytest.raises(Exception, match="12 outputs"):
        LAYOUTS[layout].check("a.weight", (12, 128), IntScheme(bits=4 if layout == "awq" else 2))


@pytest.mark.parametrize(
    ("layout", "scheme", "note"),
    [
        ("gptq", IntScheme(bits=3), "vLLM takes GPTQ checkpoints of 4 and 8 bits, symmetric"),
        ("gptq_v2", IntScheme(symmetric=False), "vLLM takes GPTQ checkpoints of 4 and 8 bits, symmetric"),
        ("gptq", IntScheme(symmetric=False), "take format: gptq_v2"),
        ("gptq", INT8, "transformers 5.23 leaves routed experts of this format random"),
        ("awq", INT4, "transformers 5.23 leaves routed experts of this format random"),
        ("awq", IntScheme(group_size=16), "Marlin kernels take group_size 32, 64, 128"),
    ],
)
def test_limits_of_runtimes_are_noted(layout: str, scheme: IntScheme, note: str) -> None:
    planned = plan(tiny_config(), lambda spec: scheme)
    lines = [*contract.notes(planned, layout), *transformers.problems(planned, layout)]
    assert any(note in line for line in lines)
