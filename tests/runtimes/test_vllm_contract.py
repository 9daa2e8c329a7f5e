"""What vLLM and transformers will not take of a plan is said before the work; what they take has no line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from quantkit.arch import arch_of
from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes import transformers
from quantkit.runtimes.vllm import command, contract
from quantkit.runtimes.vllm.contract import COMPRESSED_TENSORS
from quantkit.schemes import Float8Scheme, IntScheme, Mxfp8Scheme, Scheme, W4AFp8Scheme
from quantkit.tensors import Role, TensorInfo
from tests.counted import calls
from tests.formats.test_compressed_tensors_config import INT4, INT8, RULES, V3, Rule, is_expert, plan
from tests.tiny_models import tiny_config

problems = partial(contract.problems, layout=COMPRESSED_TENSORS)


def notes(planned: Sequence[PlannedTensor]) -> list[str]:
    """Of all runtimes that read the layout."""
    return [*contract.notes(planned, COMPRESSED_TENSORS), *transformers.notes(planned, COMPRESSED_TENSORS)]


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("chaos", "one linear")])
def test_loadable_plans_have_no_problem(rule: str) -> None:
    assert problems(plan(tiny_config(), RULES[rule])) == []


@pytest.mark.parametrize(
    ("changed", "scheme", "problem"),
    [
        (
            "layers.0.mlp.up_proj",
            INT8,
            "model.layers.0.mlp: gate_proj int4 g128, up_proj int8 g128; vLLM joins them into gate_up_proj",
        ),
        (
            "layers.1.mlp.shared_experts.gate_proj",
            None,
            "shared_experts: gate_proj unquantised, up_proj int4 g128; vLLM joins",
        ),
        (
            "layers.2.self_attn.q_a_proj",
            INT8,
            "q_a_proj int8 g128, kv_a_proj_with_mqa int4 g128; vLLM joins them into fused_qkv_a_proj",
        ),
        (
            "layers.1.mlp.experts.7.up_proj",
            INT8,
            "mlp: experts.0.gate_proj int4 g128, experts.7.up_proj int8 g128; all projections",
        ),
        ("layers.2.mlp.experts.3.down_proj", None, "experts.3.down_proj unquantised; all projections of all experts"),
        ("layers.1.self_attn.o_proj", IntScheme(bits=3, symmetric=False), ""),
    ],
)
def test_what_vllm_cannot_load_is_a_problem(changed: str, scheme: IntScheme | None, problem: str) -> None:
    found = problems(plan(tiny_config(), lambda spec: scheme if spec.name == f"model.{changed}.weight" else INT4))
    assert len(found) == (1 if problem else 0)
    assert all(problem in line for line in found)


def test_modules_without_a_quantisation_config_are_a_problem() -> None:
    specs = {spec.name.removesuffix(".weight"): spec for spec in arch_of(tiny_config()).tensors()}
    modules = ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate", "model.embed_tokens", "lm_head"]
    modules += [f"model.layers.3.{name}" for name in ("eh_proj", "embed_tokens", "shared_head.head")]
    for module in modules:
        spec = specs[module]
        planned = [PlannedTensor(TensorInfo(spec.name, spec.shape, "BF16"), INT4, None, spec)]
        assert problems(planned) == [
            f"{module}: planned as int4 g128, but vLLM reads it only unquantised; keep it.",
        ]


def test_zero_points_must_fill_words() -> None:
    planned = [PlannedTensor(TensorInfo("a.weight", (12, 128), "BF16"), IntScheme(symmetric=False), None)]
    assert "a: 12 zero points of 4 bits do not fill whole 32-bit words" in problems(planned)[0]


def test_other_layouts_have_the_modules_of_vllm_but_not_the_packing_of_compressed_tensors() -> None:
    specs = {spec.name: spec for spec in arch_of(tiny_config()).tensors()}
    head = specs["lm_head.weight"]
    scheme = IntScheme(symmetric=False)
    planned = [
        PlannedTensor(TensorInfo("a.weight", (12, 128), "BF16"), scheme, None),
        PlannedTensor(TensorInfo(head.name, head.shape, "BF16"), scheme, None, head),
    ]
    assert [line.partition(":")[0] for line in contract.problems(planned, "toy")] == ["lm_head"]
    assert notes(planned) != []
    assert contract.notes(planned, "toy") == []


@pytest.mark.parametrize(
    ("rule", "note"),
    [
        (lambda spec: IntScheme(bits=3), "(int3 g128): vLLM multiplies 3 bits from 0.33 on, by its Humming"),
        (
            lambda spec: IntScheme(bits=6),
            "transformers needs compressed-tensors 0.18 or newer for it, vLLM",
        ),
        (lambda spec: IntScheme(bits=3, group_size=8), "(int3 g8): vLLM's Humming kernels take groups of 16 or more"),
        (lambda spec: IntScheme(group_size=None), "takes Humming kernels on H100 and H200, and ends with an Assertion"),
        (lambda spec: IntScheme(group_size=None), "take group_size 128, or start it with --moe-backend marlin."),
        (lambda spec: IntScheme(bits=3, group_size=None), "has only Humming kernels for this width, and ends with an"),
        (
            lambda spec: IntScheme(bits=8, symmetric=False),
            "multiplies 8 bits with zero points from 0.33 on, by its Humm",
        ),
        (lambda spec: IntScheme(group_size=16), "(int4 g16): vLLM's Marlin kernels take group_size 32, 64, 128"),
        (lambda spec: IntScheme(symmetric=False), "transformers 5.23 cannot load zero points"),
        (lambda spec: IntScheme(scale_dtype="float32"), "vLLM rounds scales to the model's dtype"),
        (lambda spec: INT8, "vLLM 0.24 takes 8-bit routed experts only with group_size null"),
        (lambda spec: INT4, "o_proj: 128 inputs are 1 group of 128, so vLLM cannot split the model by tensor"),
        (
            lambda spec: IntScheme(group_size=32) if is_expert(spec) else IntScheme(group_size=16),
            "experts.0.down_proj: 128 inputs are 4 groups of 32, so vLLM can split experts over at most 4 GPUs by "
            "tensor parallelism; expert and pipeline parallelism are free.",
        ),
        (
            lambda spec: IntScheme(group_size=16) if is_expert(spec) else IntScheme(group_size=32),
            "o_proj: 128 inputs are 4 groups of 32, so vLLM can split the model over at most 4 GPUs by tensor "
            "parallelism; pipeline parallelism is free.",
        ),
        (lambda spec: Float8Scheme(), "vLLM rounds their inputs to FP8 too"),
        (lambda spec: None if is_expert(spec) else INT4, "loses unquantised routed experts"),
        (
            lambda spec: (INT8 if spec.layer == 1 else INT4) if is_expert(spec) else INT4,
            "reads all as one scheme",
        ),
    ],
)
def test_limits_of_runtimes_are_noted(rule: Rule, note: str) -> None:
    assert any(note in line for line in notes(plan(tiny_config(), rule)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_each_width_names_the_version_and_the_kernels_that_it_needs(bits: int) -> None:
    """4 and 8 bits: nothing, since every version has kernels; 2 bits were never packed otherwise."""
    found = contract.notes(plan(tiny_config(), lambda spec: IntScheme(bits=bits)), COMPRESSED_TENSORS)
    humming = [text for text in found if f"vLLM multiplies {bits} bits from 0.33 on, by its Humming kernels" in text]
    assert len(humming) == (bits not in (4, 8))
    assert any("compressed-tensors 0.18" in text for text in humming) == (bits in (3, 5, 6, 7))


def test_rows_are_a_matter_of_experts_alone() -> None:
    found = notes(plan(tiny_config(), lambda spec: IntScheme() if is_expert(spec) else IntScheme(group_size=None)))
    assert not any("AssertionError" in text for text in found)


def test_groups_that_marlin_lacks_are_no_matter_for_other_widths() -> None:
    found = notes(plan(tiny_config(), lambda spec: IntScheme(bits=3, group_size=16)))
    assert not any("Marlin" in text or "Humming kernels take groups" in text for text in found)


def test_a_plan_for_every_runtime_has_no_notes() -> None:
    assert notes(plan(V3, lambda spec: None if spec.role is Role.MTP else INT4)) == []


def test_checking_v3_is_little_work() -> None:
    """Half a second."""
    planned = plan(V3, RULES["mtp kept"])
    assert problems(planned) == []
    assert calls(lambda: (problems(planned), notes(planned))) < 100 * 46_183


@pytest.mark.parametrize("name", RULES)
def test_each_runtime_has_notes_of_its_own(name: str) -> None:
    planned = plan(tiny_config(), RULES[name])
    assert all("transformers 5.23" in line for line in transformers.notes(planned, COMPRESSED_TENSORS))
    assert not any("transformers" in line for line in contract.notes(planned, COMPRESSED_TENSORS)[1:])


def test_of_an_unknown_family_only_shapes_are_judged() -> None:
    """Without a spec no module is taken for a router or an expert, whatever its name."""
    names = ("a.mlp.gate", "a.experts.0.up_proj", "a.experts.1.up_proj")
    schemes = (INT4, INT4, IntScheme(bits=3))
    planned = [
        PlannedTensor(TensorInfo(f"{name}.weight", (32, 128), "BF16"), scheme, None)
        for name, scheme in zip(names, schemes, strict=True)
    ]
    assert problems(planned) == []
    (line,) = notes(planned)
    assert line.startswith("a.experts.1.up_proj (int3 g128): vLLM multiplies 3 bits from 0.33 on")


def test_w4afp8_needs_outputs_that_the_kernel_takes() -> None:
    """Of V3 that leaves out q_a beside kv_a: 1536 and 576 outputs in one module."""
    (found,) = problems(plan(V3, lambda spec: W4AFp8Scheme()))
    first = "model.layers.0.self_attn.fused_qkv_a_proj and 61 more: 2,112 outputs as int4 g128 FP8 inputs"
    assert found.startswith(first)  # one more is the MTP layer's
    assert problems(plan(V3, lambda spec: W4AFp8Scheme() if is_expert(spec) else INT8)) == []


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (W4AFp8Scheme(), "Hopper alone (compute capability 9.0: H100, H200)"),
        (Mxfp8Scheme(), "On Blackwell it rounds their inputs to MXFP8 too"),
    ],
    ids=["w4afp8", "mxfp8"],
)
def test_which_gpus_compute_with_fp8_inputs_is_said(scheme: Scheme, said: str) -> None:
    found = [line for line in notes(plan(V3, lambda spec: scheme if is_expert(spec) else INT8)) if said in line]
    assert len(found) == 1
    assert not any(said in line for line in notes(plan(V3, lambda spec: INT4)))
    cut = [line for line in notes(plan(tiny_config(), lambda spec: scheme)) if "by tensor parallelism" in line]
    assert len(cut) == 1
    assert ("1 group of 128" in cut[0]) == isinstance(scheme, W4AFp8Scheme)


def test_the_command_serves_float16_scales_in_float16() -> None:
    def tensor(scale_dtype: str) -> PlannedTensor:
        scheme = IntScheme.model_validate({"bits": 4, "group_size": 32, "scale_dtype": scale_dtype})
        return PlannedTensor(TensorInfo("a.weight", (64, 64), "BF16"), scheme, None)

    assert command.serve("out", [tensor("bfloat16"), tensor("float16")]) == "vllm serve out --dtype float16"
    assert command.serve("out", [tensor("bfloat16")]) == "vllm serve out"
