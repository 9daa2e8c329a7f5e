"""bitsandbytes folders: its own bytes and states, levels of both quantisations, and experts refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from quantkit.errors import PlanError, SchemeError
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts import LAYOUTS
from quantkit.quantizers import Gptq, Rtn
from quantkit.runtimes.vllm import contract
from quantkit.schemes import Bnb4Scheme, QuantError, QuantizedTensor, Scheme
from tests.convert.jobs import recipe_of, run, write_model, write_text
from tests.formats.test_compressed_tensors_config import is_expert, plan
from tests.formats.test_integer_layouts import in_layouts
from tests.formats.test_other_packages import cases, golden
from tests.quantizers.test_methods import loss, problem
from tests.tiny_models import tiny_config

BITSANDBYTES = LAYOUTS["bitsandbytes"]
SCHEMES = [
    Bnb4Scheme(),
    Bnb4Scheme(double_quant=False),
    Bnb4Scheme(type="fp4", block_size=128),
    Bnb4Scheme(type="fp4", double_quant=False),
]


def state_of(stored: dict[str, Tensor]) -> dict[str, Any]:
    (name,) = [name for name in stored if "quant_state" in name]
    return json.loads(bytes(stored[name].tolist()))


WHOLE_BLOCKS = [
    case for kind, case in cases() if kind == "bitsandbytes" and "nested" not in case and case != "nf4_b64_k96"
]


@pytest.mark.parametrize("case", WHOLE_BLOCKS)
def test_packed_as_by_bitsandbytes(case: str) -> None:
    """The tensors that it made, from the codes and scales in them."""
    section, theirs, _ = golden("bitsandbytes", case)
    n_out, n_in = state_of(theirs)["shape"]
    scheme = Bnb4Scheme(type=section["bnb_4bit_quant_type"], block_size=64, double_quant=False)
    packed = theirs["weight"].flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).view(n_out, n_in)
    stored = {"codes": codes, "scale": theirs["weight.absmax"].view(n_out, -1)}
    ours = BITSANDBYTES.pack(QuantizedTensor("m.weight", scheme, stored, QuantError(0.0)))
    assert {name.removeprefix("m.") for name in ours} == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" not in name:
            assert torch.equal(ours[f"m.{name}"], tensor), name
    assert state_of(dict(ours)) == state_of(theirs)


def test_a_doubly_quantised_state_has_the_keys_of_bitsandbytes() -> None:
    _, theirs, _ = golden("bitsandbytes", "nf4_b64_k128_nested")
    weight = torch.randn(1, 136, 128, generator=torch.Generator().manual_seed(1))
    stored = {key: value[0] for key, value in Bnb4Scheme().rounded(weight, None, points=0, signed=True).items()}
    ours = BITSANDBYTES.pack(QuantizedTensor("m.weight", Bnb4Scheme(), stored, QuantError(0.0)))
    shapes = {name.removeprefix("m."): (t.dtype, t.shape) for name, t in ours.items() if "quant_state" not in name}
    assert shapes == {name: (t.dtype, t.shape) for name, t in theirs.items() if "quant_state" not in name}
    assert state_of(dict(ours)) == {**state_of(theirs), "nested_offset": 0.0}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", [Rtn(), Rtn(scale_search="range"), Gptq()], ids=["rtn", "range", "gptq"])
def test_decoded_as_float64_says(scheme: Bnb4Scheme, method: Rtn | Gptq) -> None:
    weight, stats = problem()
    reach = weight.abs().amax((1, 2))
    batch = method.quantizer(stats)(weight, scheme, reach=reach)
    scale = batch.stored["scale"]
    if scheme.double_quant:
        powers = torch.cat((torch.zeros(1), torch.exp2(torch.linspace(-10, 0, 255, dtype=torch.float64)))).double()
        scale = powers[scale.long()] * reach.double()[:, None, None]
    values = scheme.levels(weight.device).double()[batch.stored["codes"].long()]
    expected = values * scale.double().repeat_interleave(scheme.block_size, -1)
    torch.testing.assert_close(batch.decode().double(), expected, rtol=1e-6, atol=1e-9)
    assert bool((scale >= 0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_and_error_feedback_lower_the_loss(scheme: Bnb4Scheme) -> None:
    weight, stats = problem()
    hessian = stats.hessian.clone()
    whole = Rtn(scale_search="range").quantize(weight, scheme, None).decode()
    searched = Rtn(scale_search="mse").quantize(weight, scheme, None).decode()
    assert float((searched - weight).square().sum()) < 0.97 * float((whole - weight).square().sum())
    swept = Gptq().quantizer(stats)(weight, scheme).decode()
    assert torch.all(loss(weight, swept, hessian) < 0.8 * loss(weight, searched, hessian))


def test_blocks_of_zeros_and_what_is_no_number() -> None:
    weight = torch.zeros(1, 4, 128)
    for scheme in SCHEMES:
        assert torch.all(scheme.decode(**scheme.rounded(weight, None, points=8, signed=True)) == 0)
        with pytest.raises(SchemeError, match="NaN or infinite"):
            scheme.rounded(weight + torch.nan, None, points=8, signed=True)
        with pytest.raises(SchemeError, match="is not a multiple of block_size"):
            scheme.check("a.weight", (4, 96))
        assert TypeAdapter(Scheme).validate_json(scheme.model_dump_json()) == scheme


# --- plan and conversion ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bnb")
    write_model(root / "model")
    write_text(root / "calibration.txt")
    return root


def rule(match: str, **scheme: Any) -> dict[str, Any]:
    return {"match": match, "scheme": {"kind": "bnb4", **scheme}, "method": {"kind": "rtn", "grid": 4}}


@pytest.mark.parametrize("double", [True, False])
def test_a_conversion_comes_back_in_the_planned_bytes(double: bool, place: Path) -> None:
    recipe = recipe_of(rule("role:attention|mlp|shared_expert", double_quant=double), tokens=None)
    out = place / f"out-{double}"
    report = run(place / "model", in_layouts(recipe, "bitsandbytes"), out)
    with FolderSource(out, BITSANDBYTES.reader) as source:
        assert report.outputs[0].nbytes == sum(info.nbytes for info in source.raw.infos().values())
        section = source.config["quantization_config"]
        assert isinstance(section, dict)
        assert section["bnb_4bit_use_double_quant"] is double
        skipped = set(section["llm_int8_skip_modules"])
        assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts"} <= skipped
        name = "model.layers.1.self_attn.o_proj.weight"
        assert torch.equal(source.read(name, (3, 9)), source.read(name)[3:9])
        assert source.read("model.layers.1.mlp.experts.0.up_proj.weight").dtype == torch.bfloat16


def test_routed_experts_are_refused_with_the_reason(place: Path) -> None:
    recipe = in_layouts(recipe_of(rule("role:attention|mlp|shared_expert|expert"), tokens=None), "bitsandbytes")
    with pytest.raises(PlanError) as refused:
        run(place / "model", recipe, place / "refused")
    (line,) = refused.value.message.splitlines()
    assert "mlp.experts.0.gate_proj and " in line
    assert "more routed experts: nothing loads experts of bitsandbytes, which runtimes hold fused" in line


def test_one_scheme_for_all() -> None:
    planned = plan(
        tiny_config(), lambda s: None if is_expert(s) else Bnb4Scheme(type="fp4" if "o_proj" in s.name else "nf4")
    )
    assert "NF4 g64 double and FP4 g64 double are planned" in BITSANDBYTES.problems(planned)[0]


def test_vllm_does_not_read_it() -> None:
    planned = plan(tiny_config(), lambda spec: None if is_expert(spec) else Bnb4Scheme())
    (line,) = contract.notes(planned, "bitsandbytes")
    assert "vLLM 0.33 does not read bitsandbytes" in line
