"""Config groups say for every module, under every name a runtime may use, what the plan says; and V3 has the known
size."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.arch import arch_of
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.layouts.compressed_tensors_config import find_targets, mistakes, quantization_config
from quantkit.formats.planned import PlannedTensor
from quantkit.schemes import Float8Scheme, IntScheme
from quantkit.tensors import Role, TensorInfo, TensorSpec
from tests.counted import calls
from tests.tiny_models import tiny_config

Rule = Callable[[TensorSpec], IntScheme | Float8Scheme | None]
INT4, INT8 = IntScheme(), IntScheme(bits=8)
V3 = json.loads((Path(__file__).parents[2] / "examples/deepseek-v3-671b/config.json").read_text())

V3_SPECS = tuple(arch_of(V3).tensors())
VLLM_FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""packed_modules_mapping of vLLM's deepseek_v2.py."""


def plan(config: dict[str, object], rule: Rule, *, mtp: bool = True) -> list[PlannedTensor]:
    planned: list[PlannedTensor] = []
    for spec in V3_SPECS if config is V3 else arch_of(config).tensors():
        if spec.role is Role.MTP and not mtp:
            continue
        dtype = "F32" if spec.float32 else "BF16"
        scheme = rule(spec) if spec.linear else None
        info = TensorInfo(spec.name, spec.shape, dtype)
        planned.append(PlannedTensor(info, scheme, None if scheme else dtype, spec))
    return planned


def is_expert(spec: TensorSpec) -> bool:
    return spec.expert is not None


def nbytes(planned: list[PlannedTensor]) -> int:
    return sum(info.nbytes for tensor in planned for info in COMPRESSED_TENSORS.infos(tensor))


RULES: dict[str, Rule] = {
    "one scheme": lambda spec: INT4,
    "experts int4, rest int8": lambda spec: INT4 if is_expert(spec) else INT8,
    "experts only": lambda spec: INT4 if is_expert(spec) else None,
    "all but experts": lambda spec: None if is_expert(spec) else INT8,
    "attention only": lambda spec: INT8 if spec.role is Role.ATTENTION else None,
    "kv_b kept": lambda spec: None if "kv_b_proj" in spec.name else INT4,
    "mtp kept": lambda spec: None if spec.role is Role.MTP else INT4 if is_expert(spec) else INT8,
    "three schemes": lambda spec: (
        INT4 if is_expert(spec) else IntScheme(group_size=32) if spec.role is Role.SHARED_EXPERT else INT8
    ),
    "fused pair of its own": lambda spec: INT8 if spec.name.endswith(("q_a_proj.weight", "mqa.weight")) else INT4,
    "fp8 attention": lambda spec: Float8Scheme() if spec.role is Role.ATTENTION else INT4,
    "experts by layer": lambda spec: (INT8 if spec.layer == 1 else INT4) if is_expert(spec) else IntScheme(bits=6),
    "attention by layer": lambda spec: (
        (INT8, None, INT4, INT4)[spec.layer or 0] if spec.role is Role.ATTENTION else INT4
    ),
    "one linear": lambda spec: INT8 if spec.name == "model.layers.2.self_attn.o_proj.weight" else None,
    "chaos": lambda spec: (INT4, INT8, None)[sum(map(ord, spec.name)) % 3],
}


@pytest.mark.parametrize("rule", RULES)
def test_compressed_tensors_finds_the_planned_scheme_for_every_linear(rule: str) -> None:
    planned = plan(tiny_config(), RULES[rule])
    config = QuantizationConfig.model_validate(quantization_config(planned))
    scheme_of = {target: group for group in config.config_groups.values() for target in group.targets}
    linear = torch.nn.Linear(1, 1)
    for tensor in planned:
        if len(tensor.info.shape) != 2 or tensor.role == "embed":
            continue
        matched = match_targets(tensor.module, linear, scheme_of)
        if not matched or is_match(tensor.module, linear, config.ignore):
            assert tensor.scheme is None, f"{tensor.module} is planned as {tensor.scheme}"
            continue
        assert tensor.scheme is not None, f"{tensor.module} is planned as kept"
        found = scheme_of[matched[0]].weights
        assert found is not None
        if isinstance(tensor.scheme, Float8Scheme):
            assert (found.type, found.strategy, found.block_structure) == ("float", "block", [128, 128])
        else:
            size = tensor.scheme.group_size
            assert (found.num_bits, found.group_size, found.symmetric) == (
                tensor.scheme.bits,
                size or -1,
                tensor.scheme.symmetric,
            )


def vllm_target(name: str, class_name: str, targets: list[str]) -> str | None:
    """Order of vLLM's lookup: the name as it is, the class (a part of its name suffices), the parts of a fused
    module."""
    by_name = next((t for t in targets if is_match(name, torch.nn.Identity(), t)), None)
    by_class = next((t for t in targets if not t.startswith("re:") and t.lower() in class_name.lower()), None)
    return by_name or by_class


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("chaos", "one linear")])
def test_vllm_finds_the_scheme_of_fused_modules(rule: str) -> None:
    planned = plan(tiny_config(), RULES[rule])
    config = QuantizationConfig.model_validate(quantization_config(planned))
    schemes = {tensor.module: tensor.scheme for tensor in planned}
    weights = {target: group.weights for group in config.config_groups.values() for target in group.targets}
    n_checked = 0
    for fused, parts in VLLM_FUSED.items():
        for module, scheme in schemes.items():
            if not module.endswith(f".{parts[0]}") or ".experts." in module:
                continue
            ignored = [
                is_match(module.removesuffix(parts[0]) + part, torch.nn.Identity(), config.ignore) for part in parts
            ]
            assert set(ignored) == {scheme is None}
            if scheme is not None:
                target = vllm_target(module.removesuffix(parts[0]) + fused, "MergedColumnParallelLinear", list(weights))
                assert target is not None
                assert weights[target].num_bits == (8 if isinstance(scheme, Float8Scheme) else scheme.bits)
            n_checked += 1
    assert n_checked == 8


def test_groups_are_few_and_said_in_patterns() -> None:
    section = quantization_config(plan(V3, RULES["mtp kept"]))
    assert section["ignore"] == ["lm_head", r"re:.*\.layers\.61\..*", r"re:.*\.mlp\.gate$"]
    groups = section["config_groups"]
    assert isinstance(groups, dict)
    assert [group["targets"] for group in groups.values()] == [
        [r"re:.*\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"],
        ["Linear"],
    ]
    assert section["format"] == "pack-quantized"
    assert len(json.dumps(quantization_config(plan(tiny_config(), RULES["three schemes"])))) < 2000


def test_channel_scales_are_written_as_minus_one() -> None:
    section = quantization_config(plan(tiny_config(), lambda spec: IntScheme(group_size=None)))
    weights = section["config_groups"]["group_0"]["weights"]  # type: ignore[index]
    assert (weights["strategy"], weights["group_size"]) == ("channel", -1)


def test_kept_experts_are_ignored_under_the_name_of_their_block_too() -> None:
    ignore = quantization_config(plan(tiny_config(), RULES["all but experts"]))["ignore"]
    assert isinstance(ignore, list)
    assert is_match("model.layers.1.mlp.experts", torch.nn.Identity(), ignore)
    assert not is_match("model.layers.1.mlp.shared_experts.up_proj", torch.nn.Identity(), ignore)


def test_names_that_no_pattern_can_separate_are_listed() -> None:
    """A leaf of one kind that ends like another kind: the pattern of the second would take the first as well."""
    names = {
        "m.layers.0.a.mlp.up": INT4,
        "m.layers.0.mlp.up": INT8,
        "m.layers.1.a.mlp.up": INT4,
        "m.layers.1.mlp.up": INT8,
    }
    planned = [
        PlannedTensor(TensorInfo(f"{name}.weight", (8, 128), "BF16"), scheme, None) for name, scheme in names.items()
    ]
    planned.append(PlannedTensor(TensorInfo("m.layers.0.x.weight", (8, 128), "BF16"), None, "BF16"))
    targets = find_targets(planned)
    assert not mistakes(targets, planned)
    assert sorted(target for group in targets.groups for target in group.targets) == sorted(names)
    assert targets.ignore == ("lm_head", "m.layers.0.x")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 10, 40]))
def test_any_mixture_is_said_exactly(seed: int, uniform: int) -> None:
    """Schemes drawn for each kind of linear, with an exception in one layer of ``uniform``: layers and names appear
    where needed."""
    draw = random.Random(seed)
    schemes = [INT4, INT8, None, Float8Scheme()]
    kinds: dict[str, IntScheme | Float8Scheme | None] = {}

    def rule(spec: TensorSpec) -> IntScheme | Float8Scheme | None:
        kind = re.sub(r"\.\d+\.", ".*.", spec.name)
        kinds.setdefault(kind, draw.choice(schemes))
        return draw.choice(schemes) if draw.randrange(uniform + 1) == 0 else kinds[kind]

    planned = plan(tiny_config(n_routed_experts=8), rule)
    assert mistakes(find_targets(planned), planned) == []


def test_nothing_quantised_is_no_section() -> None:
    assert quantization_config(plan(tiny_config(), lambda spec: None)) == {}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda spec: INT4, 348_909_324_928),
        (lambda spec: IntScheme(group_size=64), 359_363_475_072),
        (lambda spec: IntScheme(group_size=32), 380_271_775_360),
        (lambda spec: IntScheme(symmetric=False), 351_522_862_464),
        (lambda spec: INT4 if is_expert(spec) else None, 371_407_749_120),
        (lambda spec: INT4 if is_expert(spec) else INT8, 356_487_744_128),
    ],
)
def test_deepseek_v3_has_its_exact_size(rule: Rule, expected: int) -> None:
    assert nbytes(plan(V3, rule, mtp=False)) == expected


def test_planning_v3_is_little_work() -> None:
    """A second."""
    planned = plan(V3, RULES["mtp kept"])
    assert calls(lambda: quantization_config(planned)) < 200 * 46_183
